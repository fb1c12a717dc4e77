"""Which package may import which: read from the source of every file, so lazy imports count too.

Also: no circle of imports, and tests mirror the source.
"""

import ast
import re
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = {"tomoe_vllm": ".", "tomoe_training": "training", "tomoe_serving": "serving"}
FILES = sorted(f for package, folder in PACKAGES.items() for f in (REPOSITORY / folder / package).rglob("*.py"))

# Part of the project -> parts and heavy libraries it may import. The standard library, torch and small
# libraries (yaml, rich, safetensors, ...) are free for all but the shipped folder.
ALLOWED: dict[str, set[str]] = {
    "tomoe_vllm.hf": {"torch", "transformers"},
    "tomoe_vllm.kernels": {"tomoe_vllm.hf.tomoe_math"},
    "tomoe_vllm.layers": {"tomoe_vllm.kernels", "tomoe_vllm.hf", "tomoe_vllm.compat", "vllm"},
    "tomoe_vllm.layers.attention.kv_layout": {"tomoe_vllm.hf"},
    "tomoe_vllm.layers.mlp.layout": {
        "tomoe_vllm.layers", "tomoe_vllm.kernels", "tomoe_vllm.hf", "vllm",
        "tomoe_vllm.diagnostics.roofline", "tomoe_vllm.diagnostics.step_cost",
    },
    "tomoe_vllm.models": {"tomoe_vllm.layers", "tomoe_vllm.hf", "tomoe_vllm.compat", "vllm"},
    "tomoe_vllm.observability": {"tomoe_vllm.layers", "tomoe_vllm.compat", "vllm"},
    "tomoe_vllm.diagnostics": {"tomoe_vllm.kernels", "tomoe_vllm.hf", "tomoe_vllm.__version__"},
    "tomoe_vllm.diagnostics.full": {
        "tomoe_vllm.diagnostics", "tomoe_vllm.kernels", "tomoe_vllm.hf", "tomoe_vllm.__version__",
    },
    "tomoe_vllm.diagnostics.full.training_jobs": {"tomoe_vllm.diagnostics.full", "tomoe_training"},
    "tomoe_vllm.diagnostics.full.engine_jobs": {"tomoe_vllm.diagnostics"},
    "tomoe_vllm.diagnostics.full.engine_parity": {"tomoe_vllm.hf", "vllm"},
    "tomoe_vllm.diagnostics.bench": {
        "tomoe_vllm.diagnostics", "tomoe_vllm.kernels", "tomoe_vllm.hf", "tomoe_vllm.compat", "tomoe_vllm.__version__",
        "vllm",
    },
    "tomoe_vllm.diagnostics.bench.worker": {"tomoe_vllm.layers.norm", "vllm"},
    "tomoe_vllm.plugin": {"tomoe_vllm.models", "tomoe_vllm.hf", "vllm"},
    "tomoe_vllm.compat": {"vllm"},
    "tomoe_vllm.compat.releases": {"tomoe_vllm.kernels.cache"},
    "tomoe_vllm.settings": set(),
    "tomoe_vllm.cli": {"tomoe_vllm", "tomoe_training", "tomoe_serving"},
    "tomoe_training": {
        "tomoe_vllm.hf", "tomoe_vllm.layers.attention.kv_layout", "tomoe_vllm.__version__", "tomoe_vllm.settings",
        "transformers",
    },
    "tomoe_training.evaluation.perplexity": {"tomoe_training", "tomoe_vllm.hf", "vllm"},
    "tomoe_serving": {"tomoe_vllm.__version__", "tomoe_vllm.settings"},
    "tomoe_serving.server.engine": {"tomoe_serving", "tomoe_vllm.compat.server", "vllm"},
    "tomoe_serving.api.vllm_endpoint_plugin": {"tomoe_serving", "tomoe_training.artifacts.inspection"},
}  # fmt: skip
CONTROLLED = (*PACKAGES, "vllm")
# What vLLM documents, or writes its own models with. All else of it is imported by tomoe_vllm.compat only.
PUBLIC_VLLM = {
    "vllm": {"LLM", "ModelRegistry", "SamplingParams", "__version__"},
    "vllm.compilation.decorators": {"support_torch_compile"},
    "vllm.config": {"CacheConfig", "CompilationConfig", "VllmConfig", "get_current_vllm_config"},
    "vllm.distributed": {
        "get_pp_group", "get_tensor_model_parallel_rank", "get_tensor_model_parallel_world_size",
        "get_tp_group", "tensor_model_parallel_all_reduce",
    },
    "vllm.model_executor.layers.attention": {"Attention"},
    "vllm.model_executor.layers.layernorm": {"RMSNorm"},
    "vllm.model_executor.layers.linear": {
        "ColumnParallelLinear", "MergedColumnParallelLinear", "QKVParallelLinear", "RowParallelLinear",
    },
    "vllm.model_executor.layers.logits_processor": {"LogitsProcessor"},
    "vllm.model_executor.layers.quantization": {"QuantizationConfig"},
    "vllm.model_executor.layers.rotary_embedding": {"get_rope"},
    "vllm.model_executor.layers.vocab_parallel_embedding": {"ParallelLMHead", "VocabParallelEmbedding"},
    "vllm.model_executor.model_loader.weight_utils": {"default_weight_loader"},
    "vllm.model_executor.models.interfaces": {"SupportsLoRA", "SupportsPP", "SupportsQuant"},
    "vllm.model_executor.models.utils": {
        "AutoWeightsLoader", "PPMissingLayer", "WeightsMapper", "extract_layer_index", "is_pp_missing_parameter",
        "make_empty_intermediate_tensors_factory", "make_layers", "maybe_prefix",
    },
    "vllm.model_executor.utils": {"set_weight_attrs"},
    "vllm.platforms": {"current_platform"},
    "vllm.sequence": {"IntermediateTensors"},
}  # fmt: skip
SHIPPED = ("configuration_tomoe.py", "tomoe_math.py", "modeling_tomoe.py")


def _module(file: Path) -> str:
    parts = file.relative_to(REPOSITORY).with_suffix("").parts
    parts = parts[parts[0] in ("training", "serving") :]  # the folders around the packages of that half
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


def part_of(module: str) -> str:
    """The most specific key of ALLOWED that ``module`` is in: a new module at the top needs an entry of its own."""
    return max((p for p in [*ALLOWED, *PACKAGES] if _is_within(module, p) and (p in ALLOWED or p == module)), key=len)


def forbidden(module: str, names: set[str]) -> set[str]:
    """Imports of ``names`` that ``module`` may not have."""
    part = part_of(module)
    controlled = {n for n in names if any(_is_within(n, c) for c in CONTROLLED)}
    return {n for n in controlled if not any(_is_within(n, a) for a in (part, *ALLOWED.get(part, ())))}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(REPOSITORY)))
def test_imports_follow_the_arrows(file):
    module = _module(file)
    assert forbidden(module, imports(file.read_text(), module, file.name == "__init__.py")) == set()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("tomoe_vllm.hf.modeling_tomoe", "from tomoe_training.config import RunConfig"),
        ("tomoe_vllm.kernels.expert.reference", "from tomoe_vllm.hf.modeling_tomoe import route"),
        ("tomoe_vllm.kernels.expert", "def f():\n    import vllm.config"),
        ("tomoe_vllm.layers.mlp.layout", "from tomoe_vllm import models"),
        ("tomoe_training.trainer", "from vllm import LLM"),
        ("tomoe_training.trainer", "import tomoe_vllm.layers.attention.attention"),
        ("tomoe_serving.server.app", "from tomoe_training.config import RunConfig"),
        ("tomoe_serving.admission.controller", "from vllm import LLM"),
        ("tomoe_vllm.layers.attention.attention", "from ...models import tomoe"),
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


@pytest.mark.parametrize(
    "file", [f for f in FILES if f.parent.name != "compat"], ids=lambda file: str(file.relative_to(REPOSITORY))
)
def test_private_names_of_vllm_are_imported_by_compat_only(file):
    names = imports(file.read_text(), _module(file), file.name == "__init__.py")
    assert private_names(names) == set()


def private_names(names: set[str]) -> set[str]:
    """Imports of ``names`` that vLLM may move without notice."""
    public = {f"{module}.{name}" for module, names_of in PUBLIC_VLLM.items() for name in names_of}
    return {name for name in names if _is_within(name, "vllm")} - public


def test_a_private_name_of_vllm_is_seen():
    names = imports("from vllm import _custom_ops, LLM\nfrom vllm.v1.engine.async_llm import AsyncLLM", "tomoe_vllm.x")
    assert private_names(names) == {"vllm._custom_ops", "vllm.v1.engine.async_llm.AsyncLLM"}


def test_one_file_of_the_front_imports_vllm():
    front = [f for f in FILES if f.relative_to(REPOSITORY).parts[0] == "serving"]
    users = [f for f in front if any(_is_within(n, "vllm") for n in imports(f.read_text(), _module(f)))]
    assert [f.name for f in users] == ["engine.py"]


def test_command_line_imports_the_project_lazily():
    files = sorted((REPOSITORY / "tomoe_vllm" / "cli").glob("*.py"))
    assert {f.stem for f in files} > {"app", "options", "convert", "evaluate", "serve", "diagnostics"}
    for file in files:
        tree = ast.parse(file.read_text())
        at_import = {
            name for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)
            for name in imports(ast.unparse(node), _module(file), file.name == "__init__.py")
        }  # fmt: skip
        ours = {name for name in at_import if any(_is_within(name, package) for package in CONTROLLED)}
        assert all(_is_within(name, "tomoe_vllm.cli") or name == "tomoe_vllm.__version__" for name in ours), file
        assert not {name.partition(".")[0] for name in at_import} & {"torch", "transformers", "pydantic"}, file


MODULES = {_module(file): file for file in FILES}


def graph() -> dict[str, set[str]]:
    """Module -> modules of ours that it imports, at any depth of the source."""
    edges: dict[str, set[str]] = {}
    for module, file in MODULES.items():
        names = imports(file.read_text(), module, file.name == "__init__.py")
        imported = {name if name in MODULES else name.rpartition(".")[0] for name in names}
        edges[module] = {name for name in imported if name in MODULES and name != module}
    return edges


def circle(edges: dict[str, set[str]]) -> list[str] | None:
    """One circle of imports, or None."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str] | None:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return None
        found = next(filter(None, (visit(n, [*path, module]) for n in sorted(edges.get(module, ())))), None)
        done.add(module)
        return found

    return next(filter(None, (visit(module, []) for module in sorted(edges))), None)


def test_there_is_no_circle_of_imports():
    assert circle(graph()) is None


def test_a_circle_is_seen():
    assert circle({"a": {"b"}, "b": {"c", "d"}, "c": set(), "d": {"a"}}) == ["a", "b", "d", "a"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


CROSS_CUTTING = {"live", "runs", "interpreted"}
"""Folders of tests of a whole server, of whole training runs, and of all Triton kernels in the interpreter."""
OF_ALL_TRITON_KERNELS = {"test_interpreted.py", "test_triton_compile.py"}
MIRRORED = [
    f
    for package in ("tomoe_vllm", "training", "serving")
    for f in sorted((REPOSITORY / "tests" / package).rglob("test_*.py"))
    if not CROSS_CUTTING & set(f.parts) and f.name not in OF_ALL_TRITON_KERNELS
]


def mirrored(test: Path) -> str:
    """The module that a test file is named after: tests/training/test_data.py tests tomoe_training.data."""
    package, *folders, name = test.relative_to(REPOSITORY / "tests").with_suffix("").parts
    top = package if package == "tomoe_vllm" else f"tomoe_{package}"
    return ".".join([top, *folders, name.removeprefix("test_")])


@pytest.mark.parametrize("file", MIRRORED, ids=lambda file: str(file.relative_to(REPOSITORY)))
def test_tests_mirror_the_source(file):
    """test_x.py, or test_x_more.py, is stored where module or package x is; the playground's page has no modules."""
    parent, _, name = mirrored(file).rpartition(".")
    words = name.split("_")
    names = {"_".join(words[:n]) for n in range(1, len(words) + 1)}
    assert {f"{parent}.{n}" for n in names} & set(MODULES) or parent.rpartition(".")[2] in names | {"page"}


def test_every_module_of_the_method_has_its_test():
    modules = {m for m in MODULES if m.startswith(("tomoe_training.", "tomoe_vllm.hf."))}
    packages = {m for m in modules if MODULES[m].name == "__init__.py"}
    assert modules - packages - {mirrored(file) for file in MIRRORED} == set()
