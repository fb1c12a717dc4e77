"""Provenance: versions, command, and the commit of the checkout."""

import json
import subprocess
import sys
from importlib.metadata import version

import pytest
from tomoe_training.artifacts.provenance import git_state, provenance

from tomoe_vllm import __version__


def test_record_names_versions_and_the_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/home/someone/.venv/bin/tomoe", "export", "--out", "x"])
    record = json.loads(json.dumps(provenance()))
    assert record["versions"]["tomoe-vllm"] == __version__
    assert record["versions"]["torch"] == version("torch")
    assert record["command"] == ["tomoe", "export", "--out", "x"]
    assert "someone" not in json.dumps(record)
    assert record["git"] is None or len(record["git"]["commit"]) == 40


@pytest.fixture
def checkout(tmp_path):
    """A git repository with one commit of ``module.py``, and the function that runs git in it."""

    def git(*arguments):
        identity = ("-c", "user.name=test", "-c", "user.email=test@example.org")
        result = subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return result.stdout.strip()

    (tmp_path / "module.py").write_text("a = 1\n")
    git("init", "-q")
    git("add", "module.py")
    git("commit", "-q", "-m", "first")
    return tmp_path, git


def test_commit_and_changes_of_the_checkout_are_recorded(checkout):
    folder, git = checkout
    expected = {"commit": git("rev-parse", "HEAD"), "is_dirty": False}
    assert git_state(folder / "module.py") == expected
    (folder / "notes.txt").write_text("untracked\n")
    assert git_state(folder / "module.py") == expected
    (folder / "module.py").write_text("a = 2\n")
    assert git_state(folder / "module.py") == expected | {"is_dirty": True}


def test_repository_around_an_installed_package_is_not_recorded(checkout):
    """Such as a user's project with a virtual environment inside."""
    folder, _ = checkout
    installed = folder / ".venv" / "site-packages" / "provenance.py"
    installed.parent.mkdir(parents=True)
    installed.write_text("")
    assert git_state(installed) is None


def test_no_repository_and_no_git_mean_no_record(tmp_path, monkeypatch):
    (tmp_path / "module.py").write_text("")
    assert git_state(tmp_path / "module.py") is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path / "module.py") is None
