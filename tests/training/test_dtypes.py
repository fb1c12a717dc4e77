"""Device of a command, and dtypes on different hardware."""

import pytest
import torch
from tomoe_training.dtypes import default_device, evaluation_dtype, has_fast_bfloat16, to_device, training_dtype

from tests.helpers.pretended_gpu import pretended_gpu, record_synchronizations


@pytest.mark.parametrize(
    ("units", "is_fast"),
    [({}, False), ({"avx2": True}, False), ({"amx_bf16": True}, True), ({"avx512_bf16": True}, True)],
)
def test_bfloat16_is_chosen_where_the_hardware_multiplies_it_fast(units, is_fast, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    cpu = torch.device("cpu")
    assert has_fast_bfloat16(cpu) is is_fast
    assert training_dtype("auto", cpu) == (torch.bfloat16 if is_fast else torch.float32)
    assert training_dtype("float32", cpu) == torch.float32
    assert has_fast_bfloat16(torch.device("cuda"))


def test_command_runs_on_the_gpu_if_there_is_one():
    assert default_device().type == "cpu"
    with pretended_gpu() as device:
        assert default_device().type == device.type


def test_batch_reaches_the_gpu_without_a_wait():
    batch = torch.arange(6).view(2, 3)
    assert to_device(batch, torch.device("cpu")) is batch
    with pretended_gpu() as device:
        with record_synchronizations() as waits:
            copy = to_device(batch, device)
        assert len(waits) == 0, waits
        assert copy.device == device
        assert torch.equal(copy.cpu(), batch)


@pytest.mark.parametrize(
    ("name", "stored", "device", "expected"),
    [
        ("auto", torch.bfloat16, "cpu", "float32"),
        ("auto", torch.bfloat16, "cuda", "bfloat16"),
        ("auto", torch.float32, "cuda", "float32"),
        ("auto", None, "cuda", "float32"),
        ("float32", torch.bfloat16, "cuda", "float32"),
        ("bfloat16", torch.float32, "cpu", "bfloat16"),
    ],
)
def test_dtype_of_an_evaluation(name, stored, device, expected):
    assert evaluation_dtype(name, stored, torch.device(device)) == expected
