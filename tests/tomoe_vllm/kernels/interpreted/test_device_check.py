"""The check of route and mask_values at start-up: both outcomes, with the real kernels in the interpreter."""

import logging
import sys

import pytest
import torch

from tomoe_vllm.kernels import device_check
from tomoe_vllm.kernels.device_check import check_on_device
from tomoe_vllm.kernels.ops import rejected_kernels
from tomoe_vllm.kernels.route import triton as route_kernels
from tomoe_vllm.kernels.value_mask import triton as value_kernels

ROUTERS = [(75, 8), (75, 1), (75, 8)]
VALUE_ROUTERS = [(75, 50, 3, 64, 20), (75, 50, 3, 64, 64)]


@pytest.fixture(autouse=True)
def nothing_rejected():
    rejected_kernels.clear()
    yield
    rejected_kernels.clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_right_kernels_are_used(dtype, caplog):
    check_on_device(ROUTERS, VALUE_ROUTERS, dtype, torch.device("cpu"))
    assert rejected_kernels == set()
    assert caplog.records == []


def test_right_kernels_are_used_under_the_default_dtype_of_vllm_s_loader(caplog):
    """vLLM calls the hook of the model with the model's dtype as torch's default."""
    present = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        check_on_device(ROUTERS, VALUE_ROUTERS, torch.bfloat16, torch.device("cpu"))
    finally:
        torch.set_default_dtype(present)
    assert caplog.records == []
    assert rejected_kernels == set()


def test_each_variant_of_the_kernels_is_checked():
    limits = route_kernels.MAX_TOKEN_PROGRAMS, value_kernels.FEW_TOKENS
    for (few, many), limit in zip((device_check.ROUTE_TOKENS, device_check.VALUE_TOKENS), limits, strict=True):
        assert few <= limit < many


def test_routing_is_compiled_with_and_without_a_record(monkeypatch):
    kernel, calls = route_kernels.route_triton, []

    def counted(hidden_states, weight, record=None):
        calls.append((len(hidden_states), record is not None))
        return kernel(hidden_states, weight, record)

    monkeypatch.setattr(route_kernels, "route_triton", counted)
    check_on_device([(75, 8)], [], torch.bfloat16, torch.device("cpu"))
    assert calls == [(n, has_record) for n in device_check.ROUTE_TOKENS for has_record in (False, True)]


def test_sizes_of_equal_layers_are_checked_once(monkeypatch):
    calls = []
    monkeypatch.setattr(device_check, "_check_route", lambda *arguments: calls.append(arguments[:3]))
    check_on_device(ROUTERS, [], torch.float32, torch.device("cpu"))
    assert calls == [(n, 75, experts) for experts in (1, 8) for n in device_check.ROUTE_TOKENS]


@pytest.mark.parametrize("fault", ["disagrees", "raises"])
@pytest.mark.parametrize(
    ("op", "module", "name"),
    [("route", route_kernels, "route_triton"), ("mask_values", value_kernels, "mask_values_triton")],
)
def test_a_wrong_kernel_is_rejected_with_one_warning(op, module, name, fault, monkeypatch, caplog):
    kernel = getattr(module, name)

    def broken(*arguments):
        if fault == "raises":
            raise RuntimeError("out of resource: shared memory,\nRequired: 300000")
        output = kernel(*arguments)
        output[-1] += 1  # one token of one variant
        return output

    monkeypatch.setattr(module, name, broken)
    with caplog.at_level(logging.WARNING):
        check_on_device(ROUTERS, VALUE_ROUTERS, torch.bfloat16, torch.device("cpu"))
    assert rejected_kernels == {op}
    (record,) = caplog.records
    assert f"tomoe::{op} runs in plain torch on this GPU" in record.getMessage()
    assert ("out of resource" if fault == "raises" else "of 3 tokens") in record.getMessage()
    assert "\n" not in record.getMessage()


def test_without_triton_both_run_in_plain_torch(monkeypatch, caplog):
    for name in ("route", "value_mask"):
        monkeypatch.setitem(sys.modules, f"tomoe_vllm.kernels.{name}.triton", None)
    check_on_device(ROUTERS, VALUE_ROUTERS, torch.bfloat16, torch.device("cpu"))
    assert rejected_kernels == {"route", "mask_values"}
    assert len(caplog.records) == 2
