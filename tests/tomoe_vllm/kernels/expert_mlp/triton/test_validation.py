"""The doctor's verdict: kept per kind of GPU, and forgotten when what was checked changes."""

import pytest

from tomoe_vllm.kernels.expert_mlp.triton import validation as verdict
from tomoe_vllm.kernels.expert_mlp.triton.validation import read_verdict, verdict_file, write_verdict

DEVICE = "NVIDIA A100-SXM4-80GB"


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TOMOE_CACHE_ROOT", str(tmp_path))
    return tmp_path


def test_nothing_is_known_before_a_check():
    assert read_verdict(DEVICE) is None


@pytest.mark.parametrize("failures", [[], ["gather, 1 tokens: NaN"]], ids=["agrees", "disagrees"])
def test_what_is_written_is_read(failures, cache_folder):
    file = write_verdict(DEVICE, failures)
    assert file.parent == cache_folder
    assert [path.name for path in cache_folder.iterdir()] == [file.name]
    found = read_verdict(DEVICE)
    assert (found.agrees, found.failures, found.device) == (not failures, failures, DEVICE)


def test_devices_do_not_share_a_verdict():
    write_verdict(DEVICE, ["wrong"])
    assert read_verdict("NVIDIA H100 80GB HBM3") is None


def test_a_later_check_replaces_the_verdict():
    write_verdict(DEVICE, ["wrong"])
    write_verdict(DEVICE, [])
    assert read_verdict(DEVICE).agrees


def test_other_kernels_make_it_unknown_again(monkeypatch):
    write_verdict(DEVICE, [])
    monkeypatch.setattr(verdict, "kernel_digest", lambda: "of another version")
    assert read_verdict(DEVICE) is None


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"device": 1', '{"agrees": true}'])
def test_a_damaged_file_is_no_verdict(content):
    verdict_file(DEVICE).write_text(content)
    assert read_verdict(DEVICE) is None
