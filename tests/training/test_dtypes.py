"""The dtype of the frozen base on different hardware."""

import pytest
import torch
from tomoe_training.dtypes import has_fast_bfloat16, training_dtype


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
