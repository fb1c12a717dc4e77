"""The checks themselves obey a GPU's rules: everything on one device. Kernels are replaced by their references."""

import pytest
import torch

from tests.helpers.pretended_gpu import pretended_gpu
from tomoe_vllm.diagnostics import gate_checks, kernel_checks
from tomoe_vllm.diagnostics.device import InterpretedDevice
from tomoe_vllm.diagnostics.kernel_checks import Layer, run_check
from tomoe_vllm.diagnostics.layers import TINY, TINY_PHI
from tomoe_vllm.kernels.expert_activation.reference import expert_activation_reference
from tomoe_vllm.kernels.expert_mlp.reference import expert_mlp_reference
from tomoe_vllm.kernels.route import triton as route_module
from tomoe_vllm.kernels.value_mask import mask_values_reference
from tomoe_vllm.kernels.value_mask import triton as value_mask_module


class PretendedDevice(InterpretedDevice):
    type = "gpu"


def route(hidden_states, router_weight, record=None):
    ids = (hidden_states.float() @ router_weight.T).argmax(dim=1)
    if record is not None:
        record.copy_(ids)
    return ids


def activation(projected, expert_ids, masks, name):
    return expert_activation_reference(projected, expert_ids, masks.to(projected.dtype), name)


def expert_mlp(hidden_states, expert_ids, weights, path):
    return expert_mlp_reference(hidden_states, expert_ids, weights.to(hidden_states.dtype))


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(kernel_checks, "expert_mlp_cuda", expert_mlp)
    monkeypatch.setattr(kernel_checks, "expert_activation_triton", activation)
    monkeypatch.setattr(gate_checks, "expert_activation_triton", activation)
    monkeypatch.setattr(route_module, "route_triton", route)
    monkeypatch.setattr(value_mask_module, "mask_values_triton", mask_values_reference)
    with pretended_gpu():
        yield PretendedDevice()


@pytest.mark.process
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [TINY, TINY_PHI], ids=lambda sizes: sizes.name)
def test_checks_run_on_a_device_of_their_own(sizes, dtype, device):
    layer = Layer.random(sizes.mlp, sizes.activation, sizes.has_bias, dtype, device.type)
    checks = [run_check(layer, "dense", 5, routing, device) for routing in ("random", "evenly", "one expert")]
    checks += gate_checks.run_gate_checks(sizes.gates, [layer], {dtype: (1, 5)}, device)
    assert len(checks) == 9
    assert [check.describe() for check in checks if not check.agrees] == []
