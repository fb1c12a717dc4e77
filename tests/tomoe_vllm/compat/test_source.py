"""Names, members and parameters read from source, on a package made for it."""

import pytest

from tomoe_vllm.compat.source import SourceTree

FILES = {
    "vllm/__init__.py": """
        import typing
        from .version import __version__
        if typing.TYPE_CHECKING:
            from vllm.engine.llm import LLM
        else:
            def __getattr__(name): ...
    """,
    "vllm/version.py": "__version__ = '1.0'",
    "vllm/engine/__init__.py": "from .llm import *",
    "vllm/engine/llm.py": """
        from typing import TYPE_CHECKING, NamedTuple, overload
        import torch
        try:
            from vllm.missing import Moved
        except ImportError:
            from vllm.version import __version__ as Moved
        if TYPE_CHECKING:
            from vllm.version import OnlyForTypes
            from torch import Tensor

        class Base:
            limit: int = 3
            first, second = 1, 2
            def __init__(self, config, *, name=""):
                self.config = config
            async def generate(self, prompt, params): ...

        class LLM(Base):
            @overload
            def stop(self): ...
            def stop(self, timeout): ...

        class State(NamedTuple):
            batch: int
            hidden: int

        class Foreign(torch.nn.Module): ...

        @overload
        def make(a): ...
        def make(a, b): ...
    """,
    "vllm/loop_a.py": "from vllm.loop_b import name",
    "vllm/loop_b.py": "from vllm.loop_a import name",
}


@pytest.fixture
def tree(tmp_path):
    for name, text in FILES.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = text.split("\n")
        file.write_text("\n".join(line[8:] if line.startswith(" " * 8) else line for line in lines))
    return SourceTree(tmp_path)


@pytest.mark.parametrize(
    ("module", "name", "origin"),
    [
        ("vllm.engine.llm", "LLM", "vllm.engine.llm"),
        ("vllm.engine", "LLM", "vllm.engine.llm"),  # through a star import
        ("vllm", "LLM", "vllm.engine.llm"),  # lazily, through __getattr__
        ("vllm", "__version__", "vllm.version"),
        ("vllm", "version", "vllm.version"),  # a submodule
        ("vllm.engine.llm", "Moved", "vllm.version"),  # the second branch of a try
        ("vllm.engine.llm", "torch", "vllm.engine.llm"),
    ],
)
def test_a_name_is_found_where_it_is_defined(tree, module, name, origin):
    assert tree.find(module, name).module == origin


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("vllm.engine.llm", "Absent"),
        ("vllm.absent", "LLM"),
        ("vllm.engine.llm", "OnlyForTypes"),  # the module has no __getattr__
        ("vllm.engine.llm", "Tensor"),
        ("vllm.loop_a", "name"),  # two modules that import it from each other
    ],
)
def test_a_name_that_an_import_would_not_find_is_missing(tree, module, name):
    assert tree.find(module, name) is None


@pytest.mark.parametrize("member", ["limit", "second", "config", "generate", "stop"])
def test_members_are_own_or_inherited(tree, member):
    assert tree.member(tree.find("vllm", "LLM"), member) is not None


@pytest.mark.parametrize(("name", "member"), [("LLM", "absent"), ("Foreign", "forward"), ("make", "a")])
def test_a_missing_member_is_missing(tree, name, member):
    assert tree.member(tree.find("vllm.engine.llm", name), member) is None


def test_parameters_are_those_of_the_last_definition(tree):
    llm = tree.find("vllm", "LLM")
    assert tree.parameters(llm) == ["self", "config", "name"]
    assert tree.parameters(tree.member(llm, "stop")) == ["self", "timeout"]
    assert tree.parameters(tree.find("vllm.engine.llm", "make")) == ["a", "b"]
    assert tree.parameters(tree.find("vllm.engine.llm", "State")) == ["batch", "hidden"]
    assert tree.parameters(tree.find("vllm", "__version__")) == []
