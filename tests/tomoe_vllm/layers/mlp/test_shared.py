"""The layer of the shared layout on a pretended GPU, and the names of its execution paths.

Through the Triton kernels: tests/tomoe_vllm/kernels/interpreted/test_shared_layer.py.
"""

from types import SimpleNamespace

import pytest
import torch

from tests.helpers.compare import assert_close
from tests.helpers.pretended_gpu import pretended_gpu, record_synchronizations
from tests.helpers.tiny_models import tiny_config, tiny_model
from tomoe_vllm.kernels.expert_mlp.triton.dispatch import Thresholds
from tomoe_vllm.layers.mlp.shared import ToMoESharedMLP


@pytest.mark.parametrize(
    ("device", "num_tokens", "path"),
    [
        ("cpu", 3, "shared_rows"),
        ("cuda", 3, "shared_gather"),
        ("cuda", 4, "shared_dense"),
        ("cuda", 640, "shared_grouped"),
    ],
)
def test_step_path_depends_on_the_device_and_on_its_thresholds(monkeypatch, device, num_tokens, path):
    from tomoe_vllm.layers.mlp import shared

    tuned = Thresholds(gather_tokens=3, grouped_tokens=640, max_tokens=8192)
    monkeypatch.setattr(shared, "load_thresholds", lambda shape: tuned)
    monkeypatch.setattr(shared.LayerShape, "of", lambda weights: None)
    widths = SimpleNamespace(device=SimpleNamespace(type=device))
    mlp = SimpleNamespace(expert_gate=SimpleNamespace(widths=widths), weights=None)
    assert shared.ToMoESharedMLP.step_path(mlp, num_tokens) == path


@pytest.mark.process  # compiles the pretended GPU on first use
@pytest.mark.parametrize("is_shared", [True, False], ids=["shared", "router alone"])
def test_loading_and_a_step_obey_the_rules_of_a_gpu(monkeypatch, is_shared):
    """No CPU tensor meets one of the device; a step does not wait; other weights may be loaded in place."""
    from vllm.config import VllmConfig, set_current_vllm_config

    from tomoe_vllm.layers.mlp import neuron_rows, router, shared

    for module in (neuron_rows, router, shared):
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: 1)
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: 0, raising=False)
    monkeypatch.setattr(shared, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    config = tiny_config("llama")
    with pretended_gpu() as device:
        with device, set_current_vllm_config(VllmConfig()):
            layer = ToMoESharedMLP(config, 1, has_bias=True, prefix="mlp")
        addresses: set[tuple[int, ...]] = set()
        for seed in (0, 1):
            source = tiny_model("llama", seed=seed).model.layers[1].mlp
            load(layer, source)
            layer.finish_loading()
            tensors = layer.weights.up, layer.weights.down, *layer.weights.flat()[3:6]
            addresses.add(tuple(tensor.data_ptr() for tensor in tensors))
            x = torch.randn(7, config.hidden_size, generator=torch.Generator().manual_seed(1))
            on_device = x.to(device)
            with torch.no_grad(), record_synchronizations() as waits:
                output = layer(on_device) if is_shared else layer.expert_gate(on_device)
            assert len(waits) == 0, str(waits)
            if is_shared:
                assert_close(output.cpu(), source(x[None])[0].detach())
            else:
                assert output.cpu().tolist() == source.expert_gate.router(x).argmax(-1).tolist()
        assert len(addresses) == 1


def load(layer, source) -> None:
    """Copy the tensors of a reference MLP as vLLM's loader does."""
    parts = {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}
    for name, tensor in source.state_dict().items():
        module, _, last = name.rpartition(".")
        module, part = parts.get(module, (module, 0))
        parameter, value = layer.get_parameter(f"{module}.{last}"), tensor.detach().clone()
        value.shard_id = part
        getattr(parameter, "weight_loader", lambda param, loaded: param.data.copy_(loaded))(parameter, value)
