"""The documents agree with the repository: links, commands, words."""

import re
import shlex
import subprocess
import tomllib

import pytest

from tests.helpers.processes import REPOSITORY

PAGES = sorted(f for folder in (".", "docs", "docs/notebook", "adapters", "tomoe_vllm/kernels")
               for f in (REPOSITORY / folder).glob("*.md"))  # fmt: skip
USER_PAGES = [f for f in PAGES if "notebook" not in f.parts]
LINK = re.compile(r"(?<!`)\[[^\]]*\]\(([^)\s]+)\)")
README = (REPOSITORY / "README.md").read_text()
REPLACED_WORDS = r"\b(ri" + r"val|ver" + r"dict|obst" + r"acle|se" + r"at)s?\b(?!\.py)"
"""Terms of earlier versions that the field does not use; split so that this file does not contain them."""


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_resolve(page):
    for target in LINK.findall(page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{target} does not exist"
        assert not anchor or anchor in anchors(file.read_text()), f"{target} names no heading"


def test_every_page_is_linked_from_the_index_and_the_readme():
    pages = {f.name for f in (REPOSITORY / "docs").glob("*.md")} - {"README.md"}
    index = {target.partition("#")[0] for target in LINK.findall((REPOSITORY / "docs" / "README.md").read_text())}
    linked = {target.partition("#")[0] for target in LINK.findall(README)}
    assert pages <= index, "docs/README.md must link every page"
    assert {f"docs/{page}" for page in pages} <= linked, "README.md must link every page"


def code_lines(text: str) -> list[str]:
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [line.partition(" #")[0].strip() for block in blocks for line in block.splitlines()]


def test_commands_of_the_readme_exist():
    import typer

    from tomoe_vllm.cli.app import app

    makefile = (REPOSITORY / "Makefile").read_text()
    names = set(typer.main.get_command(app).commands)
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    text = "\n".join(re.findall(r"`([^`\n]+)`", README)) + "\n" + "\n".join(code_lines(README))
    for command in re.findall(r"\btomoe ([a-z]+(?:-[a-z]+)*)", text):
        assert command in names, f"tomoe {command}"
    for target in re.findall(r"\bmake ([a-z-]+)", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"
    for group in re.findall(r"\.\[([a-z,]+)\]", text):
        assert set(group.split(",")) <= extras.keys(), group
    for line in code_lines(README):
        for word in shlex.split(line, posix=False):
            if re.match(r"(examples|benchmarks|docs)/", word):
                assert (REPOSITORY / word).exists(), word


@pytest.mark.parametrize("page", USER_PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_prose_lines_are_at_most_120_columns(page):
    in_code, long = False, []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        in_code ^= line.startswith("```")
        if len(line) > 120 and not in_code and not line.startswith(("|", "![", "<!--")):
            long.append(number)
    assert long == []


def test_words_are_those_of_the_field():
    command = ["git", "grep", "-inIP", REPLACED_WORDS]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if result.returncode > 1:
        pytest.skip("no git checkout")
    assert result.stdout == ""


def test_no_document_installs_from_an_index_that_has_no_release():
    for page in USER_PAGES:
        assert not re.search(r"pip install[^\n`]*[\s\"']tomoe-vllm", page.read_text()), page.name
