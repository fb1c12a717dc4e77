"""What is used of vLLM: collected, resolved against the installed release, and missed where it is missing."""

import ast
import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.helpers.processes import REPOSITORY
from tomoe_vllm.compat import check, releases
from tomoe_vllm.compat.contract import CONTRACT
from tomoe_vllm.compat.source import SourceTree

SOURCE = """
from vllm import LLM as Engine
from .vllm import nothing
import vllm.platforms
try:
    from vllm.new import Moved
except ModuleNotFoundError:
    from vllm.old import Moved
def f():
    from vllm.config import VllmConfig
"""


def test_imports_are_collected_at_any_depth_and_with_their_alternatives():
    found = {name.choices for name in check.imported_names(SOURCE, "module")}
    assert found == {
        (("vllm", "LLM"),),
        (("vllm", "platforms"),),
        (("vllm.config", "VllmConfig"),),
        (("vllm.new", "Moved"), ("vllm.old", "Moved")),
    }


@pytest.fixture
def release(tmp_path):
    """A release that has ``vllm.old.Moved``."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("class LLM:\n    def stop(self, timeout): ...\n")
    (tmp_path / "vllm" / "old.py").write_text("Moved = 1")
    return SourceTree(tmp_path)


def test_alternative_is_reported_and_missing_name_is_missing(release):
    names = list(check.imported_names(SOURCE, "module"))
    result = check.check_imports(release, names)
    assert result.num_resolved == 2  # LLM and Moved
    assert result.alternatives == ["vllm.old.Moved (imported by module)"]
    assert sorted(result.missing) == [
        "vllm.config.VllmConfig (imported by module)",
        "vllm.platforms (imported by module)",
    ]


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("vllm:LLM", None),
        ("vllm:LLM.stop(timeout)", None),
        ("vllm:LLM.halt or vllm:LLM.stop", None),
        ("vllm:LLM.stop(timeout, force)", "stop has no parameter force"),
        ("vllm:LLM.halt", "LLM has no halt"),
        ("vllm:Engine", "vllm has no Engine"),
        ("vllm.absent:LLM", "vllm.absent has no LLM"),
    ],
)
def test_entry_of_the_contract_says_what_is_missing(release, entry, reason):
    result = check.check_contract(release, {"place": (entry,)})
    assert result.missing == ([] if reason is None else [f"{entry}: {reason} (needed by place)"])
    assert len(result.alternatives) == (" or " in entry)


def test_malformed_entry_of_the_contract_is_refused(release):
    with pytest.raises(ValueError, match="is not module:Name"):
        check.check_contract(release, {"place": ("vllm.LLM",)})


def test_everything_resolves_in_the_installed_release():
    (package,) = find_spec("vllm").submodule_search_locations
    root = Path(package).parent
    results = check.check_release(root)
    assert {name: result.missing for name, result in results.items()} == {name: [] for name in results}
    assert results["public names"].num_resolved > 50
    assert results["private names"].num_resolved > 20
    assert results["attributes and signatures"].num_resolved > 100


@pytest.mark.parametrize("minor", releases.SUPPORTED)
def test_everything_resolves_in_the_source_of_each_supported_release(minor):
    cached = [folder for folder in releases.source_root().glob(f"{minor}.*") if releases.cached_source(folder.name)]
    if not cached:
        pytest.skip(f"the source of vllm {minor} is not in {releases.source_root()}; run: make compat")
    for folder in cached:
        for result in check.check_release(folder).values():
            assert result.missing == []


def test_a_module_that_moved_is_missing_in_the_release_that_moved_it():
    cached = list(releases.source_root().glob("0.33.*"))
    if not cached:
        pytest.skip(f"the source of vllm 0.33 is not in {releases.source_root()}; run: make compat")
    source = "from vllm.entrypoints.launchers.cli_args import make_arg_parser"
    result = check.check_imports(SourceTree(cached[0]), list(check.imported_names(source, "old")))
    assert result.missing == ["vllm.entrypoints.launchers.cli_args.make_arg_parser (imported by old)"]


@pytest.mark.process
def test_server_and_model_import_on_the_source_of_the_newest_supported_release():
    minor = releases.SUPPORTED[-1]
    cached = [folder for folder in releases.source_root().glob(f"{minor}.*") if releases.cached_source(folder.name)]
    if not cached:
        pytest.skip(f"the source of vllm {minor} is not in {releases.source_root()}; run: make compat")
    assert check.import_error(max(cached, key=lambda folder: releases.version_key(folder.name))) is None


def overridden_methods() -> dict[str, set[str]]:
    """Methods by class of this project whose base is imported from vLLM, and that the base may declare."""
    bases = {"AsyncLLM", "StatLoggerBase", "RMSNorm", "RotaryEmbedding", "UnquantizedLinearMethod",
             "UnquantizedFusedMoEMethod"}  # fmt: skip
    found = {}
    for package in ("tomoe_vllm", "serving/tomoe_serving"):
        for file in (REPOSITORY / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.ClassDef) and bases & {ast.unparse(base) for base in node.bases}:
                    methods = {s.name for s in node.body if isinstance(s, ast.FunctionDef | ast.AsyncFunctionDef)}
                    found[node.name] = methods
    return found


def test_every_overridden_method_is_in_the_contract():
    own = {"abort_all", "select", "cos_sin", "_rotate", "_kept_columns"}  # new methods of our classes
    declared = {entry.partition("(")[0].rpartition(".")[2] for entries in CONTRACT.values() for entry in entries}
    for name, methods in overridden_methods().items():
        assert methods - own - declared - {"__init__"} == set(), name


def test_report_fails_for_a_supported_release_only(monkeypatch, capsys):
    def resolved(version):
        if version == "0.33.0":
            raise RuntimeError("no network")
        return {"is_resolved": version != "0.34.0", "import_error": None}

    monkeypatch.setattr(check, "check", resolved)
    for supported, newer, code in (
        (["0.31.0", "0.32.0"], ["0.34.0"], 0),  # a newer release is only reported
        (["0.32.0", "0.33.0"], [], 1),
        (["0.32.0", "0.34.0"], [], 1),
    ):
        monkeypatch.setattr(releases, "releases_to_check", lambda s=supported, n=newer: (s, n))
        assert check.main([]) == code
        line = json.loads(capsys.readouterr().out)
        assert line["is_complete"] == (code == 0)
        assert set(line["releases"]) == {*supported, *newer}
