"""Names, class members and parameters of a package, read from its source without importing it."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Found:
    """Where a name is defined. ``node`` is None for a variable, a submodule or a name of another package."""

    module: str
    node: Definition | None = None


class SourceTree:
    """The package ``package`` in the folder ``root`` (which holds ``package/__init__.py``)."""

    def __init__(self, root: Path, package: str = "vllm") -> None:
        self.root, self.package = root, package
        self.tree = cache(self._tree)

    def file(self, module: str) -> Path | None:
        """Source file of a module, or None."""
        path = self.root.joinpath(*module.split("."))
        return next((f for f in (path / "__init__.py", path.with_suffix(".py")) if f.is_file()), None)

    def _tree(self, module: str) -> ast.Module | None:
        file = self.file(module)
        return None if file is None else ast.parse(file.read_text())

    def find(self, module: str, name: str, _seen: frozenset[tuple[str, str]] = frozenset()) -> Found | None:
        """Definition of ``name`` as ``from module import name`` sees it, through re-exports; None if there is none.

        A name that only type checkers see counts where the module has a ``__getattr__``.
        """
        tree = self.tree(module)
        if tree is None or (module, name) in _seen:
            return None
        seen = _seen | {(module, name)}
        statements = list(_statements(tree.body))
        is_lazy = any(isinstance(s, ast.FunctionDef) and s.name == "__getattr__" for s, _ in statements)
        for statement, is_typing_only in statements:
            if is_typing_only and not is_lazy:
                continue
            found = self._defined(module, statement, name, is_lazy, seen)
            if found is not None:
                return found
        return Found(f"{module}.{name}") if self.file(f"{module}.{name}") else None

    def _defined(
        self, module: str, statement: ast.stmt, name: str, is_lazy: bool, seen: frozenset[tuple[str, str]]
    ) -> Found | None:
        match statement:
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef() if statement.name == name:
                return None if _is_overload(statement) else Found(module, statement)
            case ast.Assign() if any(isinstance(t, ast.Name) and t.id == name for t in _targets(statement)):
                return Found(module)
            case ast.AnnAssign(target=ast.Name(id=target), value=value) if target == name and (value or is_lazy):
                return Found(module)
            case ast.Import() if any((a.asname or a.name.partition(".")[0]) == name for a in statement.names):
                return Found(module)
            case ast.ImportFrom():
                origin = self._origin(module, statement)
                for alias in statement.names:
                    if alias.name != "*" and (alias.asname or alias.name) == name:
                        return self.find(origin, alias.name, seen) if self._is_own(origin) else Found(origin)
                    if alias.name == "*" and self._is_own(origin) and (found := self.find(origin, name, seen)):
                        return found
        return None

    def _is_own(self, module: str) -> bool:
        return module.partition(".")[0] == self.package

    def _origin(self, module: str, statement: ast.ImportFrom) -> str:
        """Absolute name of the module that a ``from ... import`` reads."""
        if not statement.level:
            return statement.module or ""
        file = self.file(module)
        parts = module.split(".")
        is_package = file is not None and file.name == "__init__.py"
        parts = parts[: len(parts) - statement.level + is_package]
        return ".".join([*parts, *([statement.module] if statement.module else [])])

    def member(self, owner: Found, name: str) -> Found | None:
        """A method, class attribute or ``self`` attribute of a class or of one of its bases; None if there is none."""
        if not isinstance(owner.node, ast.ClassDef):
            return None
        methods = [s for s in owner.node.body if isinstance(s, ast.FunctionDef | ast.AsyncFunctionDef)]
        for method in methods:
            if method.name == name and not _is_overload(method):
                return Found(owner.module, method)
        fields = [t for s in owner.node.body for t in _targets(s) if isinstance(t, ast.Name)]
        own = [t for m in methods for s in ast.walk(m) for t in _targets(s) if _is_self(t)]
        if any(t.id == name for t in fields) or any(isinstance(t, ast.Attribute) and t.attr == name for t in own):
            return Found(owner.module)
        for base in owner.node.bases:
            expression = base.value if isinstance(base, ast.Subscript) else base
            found = isinstance(expression, ast.Name) and self.find(owner.module, expression.id)
            if found and (inherited := self.member(found, name)):
                return inherited
        return None

    def parameters(self, found: Found) -> list[str]:
        """Names of a function's parameters; of a class: its constructor's, or its fields where it declares none."""
        if isinstance(found.node, ast.ClassDef):
            if constructor := self.member(found, "__init__"):
                return self.parameters(constructor)
            targets = [s.target for s in found.node.body if isinstance(s, ast.AnnAssign)]
            return [target.id for target in targets if isinstance(target, ast.Name)]
        if found.node is None:
            return []
        arguments = found.node.args
        return [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]


def _statements(body: list[ast.stmt], is_typing_only: bool = False) -> Iterator[tuple[ast.stmt, bool]]:
    """Statements of a module, those in its branches too, and whether only type checkers see them."""
    for statement in body:
        match statement:
            case ast.If(test=test):
                yield from _statements(statement.body, is_typing_only or "TYPE_CHECKING" in ast.unparse(test))
                yield from _statements(statement.orelse, is_typing_only)
            case ast.Try():
                branches = [statement.body, *(h.body for h in statement.handlers), statement.orelse]
                for branch in branches:
                    yield from _statements(branch, is_typing_only)
            case ast.With():
                yield from _statements(statement.body, is_typing_only)
            case _:
                yield statement, is_typing_only


def _targets(statement: ast.AST) -> list[ast.expr]:
    """What a statement assigns to."""
    match statement:
        case ast.Assign():
            nested = [t.elts if isinstance(t, ast.Tuple) else [t] for t in statement.targets]
            return [target for targets in nested for target in targets]
        case ast.AnnAssign():
            return [statement.target]
    return []


def _is_overload(definition: Definition) -> bool:
    return any(ast.unparse(decorator).endswith("overload") for decorator in definition.decorator_list)


def _is_self(target: ast.expr) -> bool:
    return isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id == "self"
