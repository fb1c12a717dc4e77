"""The folder of a run: which runs may use it, and what is resumed."""

import json

import pytest
import torch
from tomoe_training.artifacts.adapter import ADAPTER_CONFIG
from tomoe_training.config import RunConfig
from tomoe_training.run_folder import RunFolder, settings_of_result

CPU = torch.device("cpu")


@pytest.fixture
def started(tmp_path):
    """Folder of a run of seed 0 that logged two steps and was killed while logging the third."""
    files = RunFolder(tmp_path / "out")
    files.create(RunConfig(seed=0))
    with files.metrics_writer(use_tensorboard=False) as write:
        write(1, {"loss": 1.0})
        write(2, {"loss": 0.12345678})
    with files.metrics.open("a") as stream:
        stream.write('{"step": 3, "lo')
    return files


def test_settings_without_effect_on_the_result_may_change():
    assert "log_every" not in settings_of_result(RunConfig())
    assert settings_of_result(RunConfig(log_every=3)) == settings_of_result(RunConfig(notes={"a": 1}))


def test_folder_is_of_one_run(started):
    started.check(RunConfig(seed=0, log_every=3))
    with pytest.raises(ValueError, match=r"belongs to another run \(seed: 0 there, 1 here\); choose another --out"):
        started.check(RunConfig(seed=1))


def test_base_may_be_written_in_another_way(tmp_path, monkeypatch):
    """A trailing slash, a relative path, "." and a link are the same folder."""
    base = tmp_path / "base"
    base.mkdir()
    (tmp_path / "link").symlink_to(base)
    files = RunFolder(tmp_path / "out")
    files.create(RunConfig(base=str(base)))
    files.metrics.write_text("")
    monkeypatch.chdir(base)
    for path in (f"{base}/", ".", "../base", "../link"):
        files.check(RunConfig(base=path))
    with pytest.raises(ValueError, match=r"belongs to another run \(base: "):
        files.check(RunConfig(base=str(tmp_path)))


def test_run_that_made_no_step_may_be_corrected(tmp_path):
    files = RunFolder(tmp_path / "out")
    files.create(RunConfig(data=["misspelt.txt"]))
    files.self_text.write_text("{}")
    files.check(RunConfig(data=["right.txt"]))
    files.create(RunConfig(data=["right.txt"]))
    assert not files.self_text.exists()
    assert "right.txt" in files.config.read_text()


def test_other_folder_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not a training run; choose another --out"):
        RunFolder(tmp_path).check(RunConfig())


def test_metrics_after_the_checkpoint_are_dropped(started):
    started.trim_metrics(1)
    assert [json.loads(line) for line in started.metrics.read_text().splitlines()] == [{"step": 1, "loss": 1.0}]


def test_metrics_are_rounded_and_incomplete_lines_dropped(started):
    started.trim_metrics(5)
    assert [json.loads(line)["loss"] for line in started.metrics.read_text().splitlines()] == [1.0, 0.123457]


def test_checkpoint_of_another_base_is_refused(started):
    assert started.load_checkpoint("sha256:a", CPU, None) is None
    started.save_checkpoint({"step": 2, "base_hash": "sha256:a"})
    assert started.load_checkpoint("sha256:a", CPU, None)["step"] == 2
    with pytest.raises(ValueError, match="was written for another base model"):
        started.load_checkpoint("sha256:b", CPU, None)


def test_finished_run_has_a_summary(started):
    assert started.summary() is None
    (started.out / ADAPTER_CONFIG).write_text('{"training": {"steps": 2}}')
    assert started.summary() == {"steps": 2}
