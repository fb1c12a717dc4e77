"""Which sizes are checked when a model was loaded, and that nothing is on a CPU."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode


@pytest.fixture
def calls(monkeypatch):
    from tomoe_vllm.layers import router_check

    calls = []
    monkeypatch.setattr(router_check, "check_on_device", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(router_check, "gather_from_ranks", lambda value: [value])
    return calls


def make_model(device: str) -> nn.Module:
    """Two layers of routers without what is around them; the second layer keeps all value dims of every token."""
    from tomoe_vllm.layers.attention.attention import ToMoEAttention
    from tomoe_vllm.layers.attention.head_mask import ToMoEHeadMask
    from tomoe_vllm.layers.mlp.router import ToMoERouter

    def bare(kind: type[nn.Module], **attributes) -> nn.Module:
        module = kind.__new__(kind)
        nn.Module.__init__(module)
        for name, value in attributes.items():
            setattr(module, name, value)
        return module

    model = nn.ModuleList()
    for mode, top_k in (("dynamic", 20), ("none", 64)):
        linear = SimpleNamespace(weight=torch.empty(8, 48, device=device))
        masks = torch.empty(8, 96, dtype=torch.bfloat16, device=device)
        model.append(bare(ToMoERouter, router=linear, num_experts=8, expert_masks=masks))
        head_gate = bare(ToMoEHeadMask, vo_mode=mode, top_k=top_k, head_dim=64)
        if mode == "dynamic":
            head_gate.value_down = SimpleNamespace(weight=torch.empty(32, 48, device=device))
        model.append(bare(ToMoEAttention, head_gate=head_gate, num_heads=3))
    return model


def test_sizes_of_all_layers_are_checked_on_a_gpu(calls):
    from tomoe_vllm.layers.router_check import check_routers

    with FakeTensorMode():
        check_routers(make_model("cuda"))
    ((routers, value_routers, dtype, device),) = calls
    assert routers == [(48, 8), (48, 8)]
    assert value_routers == [(48, 32, 3, 64, 20)]
    assert dtype == torch.bfloat16
    assert device.type == "cuda"


def test_a_kernel_that_one_rank_rejects_is_used_by_none(calls, monkeypatch, caplog):
    from tomoe_vllm.layers import router_check

    monkeypatch.setattr(router_check, "rejected_kernels", rejected := {"mask_values"})
    monkeypatch.setattr(router_check, "gather_from_ranks", lambda value: [value, "", "mask_values route"])
    with FakeTensorMode():
        router_check.check_routers(make_model("cuda"))
    assert rejected == {"mask_values", "route"}
    (record,) = caplog.records
    assert "tomoe::route runs in plain torch" in record.getMessage()


def test_nothing_is_checked_on_a_cpu(calls):
    from tomoe_vllm.layers.router_check import check_routers

    check_routers(make_model("cpu"))
    check_routers(nn.Linear(2, 2))
    assert calls == []


def test_a_loaded_model_is_checked(monkeypatch):
    from tomoe_vllm.models import tomoe

    checked = []
    monkeypatch.setattr(tomoe, "check_routers", checked.append)
    model = tomoe.ToMoEForCausalLM.__new__(tomoe.ToMoEForCausalLM)
    nn.Module.__init__(model)
    model.process_weights_after_loading()
    assert checked == [model]
