"""Folders and files that appear complete or not at all."""

import json
import os

import pytest
from tomoe_training.artifacts.atomic import atomic_folder, link_or_copy, write_json

from tests.helpers.processes import start_python


def test_folder_appears_when_the_block_succeeds(tmp_path):
    out = tmp_path / "deep" / "out"
    with atomic_folder(out) as folder:
        (folder / "a").write_text("1")
        assert not out.exists()
    assert [p.name for p in out.iterdir()] == ["a"]
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    umask = os.umask(0)
    os.umask(umask)
    assert out.stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_failed_block_leaves_no_folder(tmp_path, error):
    def write():
        with atomic_folder(tmp_path / "out") as folder:
            (folder / "a").write_text("1")
            raise error

    with pytest.raises(error):
        write()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.process
def test_leftovers_of_killed_processes_are_removed_and_folders_in_use_are_not(tmp_path):
    code = f"""
import pathlib, time
from tomoe_training.artifacts.atomic import atomic_folder
with atomic_folder(pathlib.Path({str(tmp_path / "out")!r})) as folder:
    (folder / "a").write_text("half")
    print(folder.name, flush=True)
    time.sleep(600)
"""
    dead, alive = start_python("-c", code), None
    try:
        left = dead.stdout.readline().strip()
        dead.kill()
        dead.communicate()
        assert (tmp_path / left).is_dir()
        alive = start_python("-c", code)
        written = alive.stdout.readline().strip()
        assert [p.name for p in tmp_path.iterdir()] == [written]  # the second writer removed what the first left
        with atomic_folder(tmp_path / "out"):
            assert (tmp_path / written / "a").read_text() == "half"
    finally:
        for process in filter(None, (dead, alive)):
            process.kill()
            process.communicate()
    assert {p.name for p in tmp_path.iterdir()} == {"out", written}


def test_empty_folder_is_used_and_a_non_empty_one_refused(tmp_path):
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
    with pytest.raises(ValueError, match="already exists; choose another --out"), atomic_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out" / "a").read_text() == "1"
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="already exists"), atomic_folder(tmp_path / "file"):
        pass


def test_json_is_replaced_atomically(tmp_path):
    file = tmp_path / "a.json"
    file.write_text("old")
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert file.read_text() == "old"
    write_json(file, {"a": [1]})
    assert json.loads(file.read_text()) == {"a": [1]}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_links_resolve_symlinks_and_fall_back_to_copies(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("1")
    (tmp_path / "link").symlink_to(tmp_path / "a")  # as in the hub's cache
    link_or_copy(tmp_path / "link", tmp_path / "b")
    assert (tmp_path / "b").stat().st_ino == (tmp_path / "a").stat().st_ino
    assert not (tmp_path / "b").is_symlink()

    def refuse(*args):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    link_or_copy(tmp_path / "link", tmp_path / "c")
    assert (tmp_path / "c").read_text() == "1"
    assert (tmp_path / "c").stat().st_ino != (tmp_path / "a").stat().st_ino
