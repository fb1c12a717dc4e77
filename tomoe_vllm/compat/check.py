"""Resolve what this project uses of vLLM against the source of each supported release.

    python -m tomoe_vllm.compat.check            (make compat)

It checks every name that a package of this project imports from vllm, the attributes and signatures of
``contract.CONTRACT``, and that the server and the vLLM model can be imported on that source (``import_check``, in a
process of its own). A table goes to stderr, one JSON line to stdout. Exit code 1 if a supported release lacks something
or its source cannot be downloaded. A newer release on the package index is checked too, and only reported.
"""

import argparse
import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tomoe_vllm.compat import releases
from tomoe_vllm.compat.contract import CONTRACT
from tomoe_vllm.compat.source import SourceTree

PACKAGES = ("tomoe_vllm", "tomoe_training", "tomoe_serving")


@dataclass(frozen=True)
class ImportedName:
    """A name imported from vLLM. ``choices``: (module, name) of each place that is tried, in this order."""

    used_by: str
    choices: tuple[tuple[str, str], ...]


@dataclass
class Result:
    """What of one group resolves in one release. ``alternatives`` and ``missing`` say what and where it is used."""

    num_resolved: int = 0
    alternatives: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{self.num_resolved} resolved"]
        if self.alternatives:
            parts.append(f"{len(self.alternatives)} by an alternative")
        if self.missing:
            parts.append(f"{len(self.missing)} MISSING")
        return ", ".join(parts)


def imported_names(source: str, used_by: str) -> Iterator[ImportedName]:
    """Names that a file imports from vLLM, at any depth. Those of ``try`` and ``except ImportError`` are choices."""
    tree = ast.parse(source)
    in_try: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Try) and any(_catches_import(handler) for handler in node.handlers):
            branches = [node.body, *(handler.body for handler in node.handlers)]
            places: dict[str, list[tuple[str, str]]] = {}
            for statement in (s for branch in branches for s in branch):
                in_try.add(statement)
                for bound, place in _imports(statement):
                    places.setdefault(bound, []).append(place)
            yield from (ImportedName(used_by, tuple(choices)) for choices in places.values())
    for node in ast.walk(tree):
        if node not in in_try:
            yield from (ImportedName(used_by, (place,)) for _, place in _imports(node))


def _catches_import(handler: ast.ExceptHandler) -> bool:
    caught = ast.unparse(handler.type) if handler.type else ""
    return "ImportError" in caught or "ModuleNotFoundError" in caught


def _imports(node: ast.AST) -> Iterator[tuple[str, tuple[str, str]]]:
    """Names of vLLM that a statement binds, with the module and the name there."""
    if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").partition(".")[0] == "vllm":
        for alias in node.names:
            yield alias.asname or alias.name, (node.module or "", alias.name)
    elif isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name.startswith("vllm."):
                module, _, name = alias.name.rpartition(".")
                yield alias.name, (module, name)


def project_imports() -> list[ImportedName]:
    """Names that the packages of this project import from vLLM."""
    found: list[ImportedName] = []
    for package in PACKAGES:
        spec = find_spec(package)
        for folder in spec.submodule_search_locations or () if spec else ():
            for file in sorted(Path(folder).rglob("*.py")):
                used_by = ".".join([package, *file.relative_to(folder).with_suffix("").parts])
                found += imported_names(file.read_text(), used_by.removesuffix(".__init__"))
    return found


def check_imports(tree: SourceTree, names: list[ImportedName]) -> Result:
    """Which of ``names`` a release has."""
    result = Result()
    for imported in names:
        found = [tree.find(module, name) is not None for module, name in imported.choices]
        text = " or ".join(f"{module}.{name}" for module, name in imported.choices)
        if not any(found):
            result.missing.append(f"{text} (imported by {imported.used_by})")
            continue
        result.num_resolved += 1
        if not found[0]:
            module, name = imported.choices[found.index(True)]
            result.alternatives.append(f"{module}.{name} (imported by {imported.used_by})")
    return result


def why_unresolved(tree: SourceTree, entry: str) -> str | None:
    """Why an entry of the contract does not hold in a release, or None if it does."""
    match = re.fullmatch(r"([\w.]+):(\w+)(?:\.(\w+))?(?:\((.*)\))?", entry)
    if match is None:
        raise ValueError(f"{entry!r} is not module:Name, module:Class.member or either with (parameters)")
    module, name, member, parameters = match.groups()
    found = tree.find(module, name)
    if found is None:
        return f"{module} has no {name}"
    if member:
        found = tree.member(found, member)
        if found is None:
            return f"{name} has no {member}"
    wanted = parameters.replace(" ", "").split(",") if parameters else []
    lacking = [p for p in wanted if p not in tree.parameters(found)]
    return f"{member or name} has no parameter {', '.join(lacking)}" if lacking else None


def check_contract(tree: SourceTree, contract: dict[str, tuple[str, ...]]) -> Result:
    """Which entries of ``contract`` hold in a release."""
    result = Result()
    for used_by, entries in contract.items():
        for entry in entries:
            choices = entry.split(" or ")
            reasons = [why_unresolved(tree, choice) for choice in choices]
            if None not in reasons:
                result.missing.append(f"{entry}: {reasons[0]} (needed by {used_by})")
                continue
            result.num_resolved += 1
            if reasons[0] is not None:
                result.alternatives.append(f"{choices[reasons.index(None)]} (needed by {used_by})")
    return result


def check_release(root: Path) -> dict[str, Result]:
    """Results of one release by group; ``root`` holds ``vllm/``."""
    tree, names = SourceTree(root), project_imports()
    private = [name for name in names if name.used_by.startswith("tomoe_vllm.compat.")]
    public = [name for name in names if name not in private]
    return {
        "public names": check_imports(tree, public),
        "private names": check_imports(tree, private),
        "attributes and signatures": check_contract(tree, CONTRACT),
    }


def import_error(root: Path) -> str | None:
    """Why the server or the model cannot be imported on the source in ``root``, or None."""
    command = [sys.executable, "-m", "tomoe_vllm.compat.import_check", str(root)]
    done = subprocess.run(command, capture_output=True, text=True)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no message"])[-1]


def table(version: str, results: dict[str, Result], error: str | None) -> str:
    """What was found for one release, for people. ``error``: of the import check, or None."""
    lines = [f"vllm {version}"]
    for name, result in results.items():
        lines.append(f"  {name:28}{result}")
        lines += [f"      alternative: {text}" for text in result.alternatives]
        lines += [f"      MISSING: {text}" for text in result.missing]
    lines.append(f"  {'imports and flags':28}{error or 'succeed'}")
    return "\n".join(lines)


def check(version: str) -> dict[str, Any]:
    """Fetch and check one release, print its table to stderr, and return its part of the JSON line.

    Raises ``RuntimeError`` if the source cannot be downloaded.
    """
    root = releases.fetch_source(version)
    results = check_release(root)
    error = import_error(root)
    print(table(version, results, error), file=sys.stderr)
    is_resolved = error is None and not any(result.missing for result in results.values())
    parts = {name.replace(" ", "_"): vars(result) for name, result in results.items()}
    return {"is_resolved": is_resolved, "import_error": error} | parts


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    description = "Resolve what this project uses of vLLM in the source of each supported release."
    argparse.ArgumentParser(prog="python -m tomoe_vllm.compat.check", description=description).parse_args(arguments)
    report: dict[str, dict[str, Any]] = {}
    supported, beyond = releases.releases_to_check()
    for version in supported + beyond:
        try:
            report[version] = check(version)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            report[version] = {"is_resolved": False, "error": str(error)}
    is_complete = all(report[version]["is_resolved"] for version in supported)
    print(json.dumps({"is_complete": is_complete, "supported": supported, "newer": beyond, "releases": report}))
    return 0 if is_complete else 1


if __name__ == "__main__":
    sys.exit(main())
