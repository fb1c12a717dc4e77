"""Who may import whom (docs, house rules): read from the source of every file, so lazy imports count too."""

import ast
import re
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("tomoe_vllm", "training", "serving")
FILES = sorted(f for package in PACKAGES for f in (REPOSITORY / package).rglob("*.py"))

# Part of the project -> parts and heavy libraries it may import. The standard library, torch and small
# libraries (yaml, rich, safetensors, ...) are free for all but the shipped folder.
ALLOWED = {
    "tomoe_vllm.hf": {"torch", "transformers"},
    "tomoe_vllm.kernels": {"tomoe_vllm.hf.tomoe_math"},
    "tomoe_vllm.kv_layout": {"tomoe_vllm.hf"},
    "tomoe_vllm.layers": {"tomoe_vllm.kernels", "tomoe_vllm.hf", "tomoe_vllm.kv_layout", "vllm"},
    "tomoe_vllm.models": {"tomoe_vllm.layers", "tomoe_vllm.hf", "vllm"},
    "tomoe_vllm.bench": {"tomoe_vllm.kernels", "tomoe_vllm.hf", "tomoe_vllm.__version__", "vllm"},
    "tomoe_vllm.plugin": {"tomoe_vllm.models", "tomoe_vllm.hf", "vllm"},
    "tomoe_vllm.worker_extension": {"tomoe_vllm.layers", "vllm"},
    "tomoe_vllm.doctor": {
        "tomoe_vllm.kernels",
        "tomoe_vllm.hf",
        "tomoe_vllm.roofline",
        "tomoe_vllm.kernel_checks",
        "tomoe_vllm.__version__",
    },
    "tomoe_vllm.kernel_checks": {"tomoe_vllm.kernels", "tomoe_vllm.roofline"},
    "tomoe_vllm.roofline": set(),
    "tomoe_vllm.cli": {"tomoe_vllm", "training", "serving"},
    "tomoe_vllm.endpoint_plugin": {"serving", "training.inspection"},
    "training": {"tomoe_vllm.hf", "tomoe_vllm.kv_layout", "tomoe_vllm.__version__", "transformers"},
    "serving": {"tomoe_vllm.__version__"},
    "serving.engine": {"serving", "vllm"},
}
CONTROLLED = ("tomoe_vllm", "training", "serving", "vllm")
SHIPPED = ("configuration_tomoe.py", "tomoe_math.py", "modeling_tomoe.py")


def _module(file: Path) -> str:
    parts = file.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str, module: str, is_package: bool = False) -> set[str]:
    """Full dotted names that a source imports, at any depth: ``from a.b import c`` is a.b.c."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = module.split(".")
            start = parts[: len(parts) - node.level + is_package] if node.level else []
            prefix = ".".join([*start, *([node.module] if node.module else [])])
            names |= {f"{prefix}.{alias.name}" for alias in node.names}
    return names


def _is_within(name: str, part: str) -> bool:
    return name == part or name.startswith(part + ".")


def forbidden(module: str, names: set[str]) -> set[str]:
    """Imports of ``names`` that ``module`` may not have."""
    part = max((p for p in ALLOWED if _is_within(module, p)), key=len, default=None)
    controlled = {n for n in names if any(_is_within(n, c) for c in CONTROLLED)}
    if part is None:
        return set()
    return {n for n in controlled if not any(_is_within(n, a) for a in (part, *ALLOWED[part]))}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(REPOSITORY)))
def test_imports_follow_the_arrows(file):
    module = _module(file)
    assert forbidden(module, imports(file.read_text(), module, file.name == "__init__.py")) == set()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("tomoe_vllm.hf.modeling_tomoe", "from training.config import RunConfig"),
        ("tomoe_vllm.kernels.expert.reference", "from tomoe_vllm.hf.modeling_tomoe import route"),
        ("tomoe_vllm.kernels.expert", "def f():\n    import vllm.config"),
        ("tomoe_vllm.layers.expert_mlp", "from tomoe_vllm import models"),
        ("training.trainer", "from vllm import LLM"),
        ("training.trainer", "import tomoe_vllm.layers.attention"),
        ("serving.app", "from training.config import RunConfig"),
        ("serving.admission", "from vllm import LLM"),
        ("tomoe_vllm.layers.attention", "from ..models import tomoe"),
    ],
)
def test_a_wrong_arrow_is_seen(module, source):
    assert forbidden(module, imports(source, module))


@pytest.mark.parametrize("file", sorted((REPOSITORY / "tomoe_vllm" / "hf").glob("*.py")), ids=lambda f: f.name)
def test_shipped_folder_imports_nothing_but_torch_transformers_and_itself(file):
    for name in imports(file.read_text(), _module(file), file.name == "__init__.py"):
        top = name.partition(".")[0]
        assert top in sys.stdlib_module_names | {"torch", "transformers"} or _is_within(name, "tomoe_vllm.hf"), name


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_import_each_other_relatively_on_one_line(name):
    source = (REPOSITORY / "tomoe_vllm" / "hf" / name).read_text()
    assert "tomoe_vllm" not in re.sub(r'"""(.|\n)*?"""', "", source).replace("tomoe_vllm_", "")
    found = {m.group(1) for m in re.finditer(r"^from \.(\w+) import \w+(?:, \w+)*$", source, re.MULTILINE)}
    relative = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom) and n.level]
    assert {node.module for node in relative} == found
    assert all(node.lineno == node.end_lineno and node.level == 1 for node in relative)
    assert {f"{module}.py" for module in found} <= set(SHIPPED)


def test_one_file_of_the_front_imports_vllm():
    front = [f for f in FILES if f.relative_to(REPOSITORY).parts[0] == "serving"]
    users = [f for f in front if any(_is_within(n, "vllm") for n in imports(f.read_text(), _module(f)))]
    assert [f.name for f in users] == ["engine.py"]


def test_command_line_imports_the_project_lazily():
    tree = ast.parse((REPOSITORY / "tomoe_vllm" / "cli.py").read_text())
    at_import = {name for node in tree.body for name in imports(ast.unparse(node), "tomoe_vllm.cli")
                 if isinstance(node, ast.Import | ast.ImportFrom)}  # fmt: skip
    heavy = ("torch", "transformers", "vllm", "training", "serving")
    assert not [n for n in at_import if any(_is_within(n, h) for h in heavy)]


def test_every_module_has_its_test():
    without_own_test = {"__init__"}
    tested = {f.stem.removeprefix("test_") for f in (REPOSITORY / "tests").rglob("test_*.py")}
    modules = {f.stem for f in (REPOSITORY / "training").glob("*.py")} | {
        f.stem for f in (REPOSITORY / "tomoe_vllm" / "hf").glob("*.py")
    }
    assert modules - tested - without_own_test == set()
