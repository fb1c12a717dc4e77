"""The checks of routing, value masks and the activation detect broken kernels; the kernels are real."""

import pytest
import torch

from tomoe_vllm.diagnostics import gate_checks
from tomoe_vllm.diagnostics.device import Graph, InterpretedDevice
from tomoe_vllm.diagnostics.gate_checks import check_activation, check_route, check_value_mask, run_gate_checks
from tomoe_vllm.diagnostics.kernel_checks import Layer
from tomoe_vllm.diagnostics.layers import TINY, TINY_PHI
from tomoe_vllm.kernels.route import triton as route_module
from tomoe_vllm.kernels.value_mask import triton as value_mask_module

DEVICE = InterpretedDevice()
F32 = torch.float32


@pytest.fixture(autouse=True)
def poisoned_buffers():
    """Disabled here: ``gate_checks`` poisons memory itself."""


class Frozen(InterpretedDevice):
    """A graph that ignores what its inputs hold now."""

    def capture(self, run):
        return Graph(lambda: None, run())


def layer_of(sizes, dtype=F32):
    return Layer.random(sizes.mlp, sizes.activation, sizes.has_bias, dtype, "cpu")


@pytest.mark.parametrize("sizes", [TINY, TINY_PHI], ids=lambda sizes: sizes.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_all_ops_agree(sizes, dtype):
    checks = run_gate_checks(sizes.gates, [layer_of(sizes, dtype)], {dtype: (1, 20)}, DEVICE)
    assert [check.path for check in checks] == ["route", "mask_values", "activation"] * 2
    assert [check.describe() for check in checks if not check.agrees] == []


def broken_route(fault, route):
    def run(hidden_states, router_weight, record):
        if fault == "a slice of D is left out":
            hidden_states = hidden_states.clone()
            hidden_states[:, 32:] = 0
        ids = route(hidden_states, router_weight, record)
        if fault == "record is not written":
            record.fill_(255)
        if fault == "expert out of range":
            ids[-1] = len(router_weight)
        return ids

    return run


@pytest.mark.parametrize("fault", ["a slice of D is left out", "record is not written", "expert out of range"])
def test_a_broken_route_disagrees(fault, monkeypatch):
    monkeypatch.setattr(route_module, "route_triton", broken_route(fault, route_module.route_triton))
    assert not check_route(TINY.gates, 20, F32, DEVICE).agrees


def broken_mask(fault, mask_values):
    def run(attention, hidden_states, router, width):
        if fault == "one dim too many":
            width += 1
        masked = mask_values(attention, hidden_states, router, width)
        if fault == "another dim":
            heads = masked[-1].view(2, -1)  # 24 dims, 9 are kept: the last token keeps the reverse
            return torch.cat([masked[:-1], torch.where(heads.flip(1) != 0, attention[-1].view(2, -1), 0).view(1, -1)])
        if fault == "one head is not masked":
            masked[:, 24:] = attention[:, 24:]
        if fault == "values are scaled":
            masked *= 1.01
        return masked

    return run


@pytest.mark.parametrize("fault", ["one dim too many", "another dim", "one head is not masked", "values are scaled"])
def test_a_broken_value_mask_disagrees(fault, monkeypatch):
    mask_values = broken_mask(fault, value_mask_module.mask_values_triton)
    monkeypatch.setattr(value_mask_module, "mask_values_triton", mask_values)
    assert not check_value_mask(TINY.gates, 3, F32, DEVICE).agrees


def test_an_activation_that_keeps_a_masked_neuron_disagrees(monkeypatch):
    activation = gate_checks.expert_activation_triton

    def broken(projected, expert_ids, masks, name):
        output = activation(projected, expert_ids, masks, name)
        output[0, masks[expert_ids[0]] == 0] += 1e-6
        return output

    monkeypatch.setattr(gate_checks, "expert_activation_triton", broken)
    assert not check_activation(layer_of(TINY), 3, DEVICE).agrees


@pytest.mark.parametrize("check", [check_route, check_value_mask])
def test_a_graph_that_ignores_new_tokens_disagrees(check):
    assert check(TINY.gates, 3, F32, DEVICE).agrees
    assert not check(TINY.gates, 3, F32, Frozen()).agrees


def test_a_kernel_that_raises_is_a_failed_check(monkeypatch):
    def raises(*arguments):
        raise RuntimeError("out of resource: registers")

    monkeypatch.setattr(route_module, "route_triton", raises)
    check = check_route(TINY.gates, 3, F32, DEVICE)
    assert not check.agrees
    assert "out of resource" in check.reason()
