"""The MLP layer of the shared layout as on a GPU: its op runs the Triton kernels, here in the interpreter.

Loading, routing, dispatch and the sum over tensor-parallel ranks are the layer's own. The reference is the MLP of the
Hugging Face model.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.compare import assert_close
from tests.helpers.tiny_models import tiny_model
from tomoe_vllm.kernels import build
from tomoe_vllm.kernels.expert_mlp.triton import dispatch
from tomoe_vllm.kernels.expert_mlp.triton.dispatch import Thresholds

LAYER = 1
NUM_TOKENS = {"gather": 3, "dense": 5, "grouped": 40}
THRESHOLDS = Thresholds(gather_tokens=3, grouped_tokens=20, max_tokens=8192)


@pytest.fixture(autouse=True)
def poisoned_buffers():
    """Disabled here: vLLM and the loader allocate memory that is not an output."""


@pytest.fixture(autouse=True)
def gpu(monkeypatch):
    """Weights are laid out as on a GPU, and the op that is registered for CUDA runs on the CPU."""
    from tomoe_vllm.layers.mlp import neuron_rows, shared

    monkeypatch.setattr(build, "load", lambda: False)
    monkeypatch.setattr(neuron_rows, "empty_rows", torch.empty)
    monkeypatch.setattr(neuron_rows, "empty_panels", torch.empty)
    monkeypatch.setattr(shared, "current_platform", SimpleNamespace(is_cpu=lambda: False))
    monkeypatch.setattr(dispatch, "load_thresholds", lambda shape: THRESHOLDS)
    library = torch.library.Library("tomoe", "IMPL")
    on_cpu = SimpleNamespace(impl=lambda op, function, key: library.impl(op, function, "CPU"))
    monkeypatch.setattr(dispatch, "LIBRARY", on_cpu)
    dispatch.register.__wrapped__()
    yield
    library._destroy()


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """Execution paths of the steps."""
    from tomoe_vllm.kernels.expert_activation import triton as activation
    from tomoe_vllm.kernels.expert_mlp.triton import gather, grouped

    paths: list[str] = []

    def record(module, name, path):
        run = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *arguments: paths.append(path) or run(*arguments))

    record(gather, "expert_mlp_gather", "gather")
    record(grouped, "expert_mlp_grouped", "grouped")
    record(activation, "expert_activation_triton", "dense")
    return paths


class Ranks:
    """The layer on each of ``size`` tensor-parallel ranks, one after the other."""

    def __init__(self, monkeypatch, size: int) -> None:
        self.monkeypatch, self.size = monkeypatch, size

    def set(self, rank: int, all_reduce=None) -> None:
        from tomoe_vllm.layers.mlp import neuron_rows, router, shared

        for module in (neuron_rows, router, shared):
            self.monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: self.size)
            self.monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank, raising=False)
        self.monkeypatch.setattr(shared, "tensor_model_parallel_all_reduce", all_reduce)

    def build(self, model: nn.Module) -> list[nn.Module]:
        from vllm.config import VllmConfig, set_current_vllm_config

        from tomoe_vllm.layers.mlp.shared import ToMoESharedMLP

        layers = []
        for rank in range(self.size):
            self.set(rank)
            with set_current_vllm_config(VllmConfig()):
                has_bias = (
                    model.model.layers[LAYER]
                    .mlp.get_submodule("fc1" if model.config.model_type == "tomoe_phi" else "up_proj")
                    .bias
                    is not None
                )
                layers.append(ToMoESharedMLP(model.config, LAYER, has_bias=has_bias, prefix=f"rank{rank}"))
            load(layers[-1], model.model.layers[LAYER].mlp)
            layers[-1].finish_loading()
        return layers

    def run(self, layers: list[nn.Module], x: Tensor) -> Tensor:
        """Output of the last rank, to which the partial sums of all ranks are reduced."""
        partial: list[Tensor] = []

        def all_reduce(value: Tensor) -> Tensor:
            partial.append(value)
            return torch.stack(partial).sum(dim=0)

        for rank, layer in enumerate(layers):
            self.set(rank, all_reduce)
            output = layer(x)
        assert len(partial) == (self.size if self.size > 1 else 0)
        return output


def load(layer: nn.Module, source: nn.Module) -> None:
    """Copy the tensors of the reference MLP as vLLM's loader does: one by one, by their names."""
    parameters = dict(layer.named_parameters())
    parts = {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}
    for name, tensor in source.state_dict().items():
        module, _, last = name.rpartition(".")
        module, part = parts.get(module, (module, 0))
        parameter, value = parameters[f"{module}.{last}"], tensor.detach().clone()
        value.shard_id = part
        weight_loader = getattr(parameter, "weight_loader", lambda parameter, value: parameter.data.copy_(value))
        weight_loader(parameter, value)


def reference(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.model.layers[LAYER].mlp(x)


@pytest.mark.parametrize("path", NUM_TOKENS)
@pytest.mark.parametrize(
    ("family", "sizes", "num_ranks"),
    [
        pytest.param("llama", {}, 1, id="gate, biases"),
        pytest.param("phi", {}, 1, id="no gate, gelu"),
        pytest.param(
            "llama",
            {"intermediate_size": 86, "expert_intermediate_sizes": [30, 43, 60]},
            2,
            id="two ranks of 43 neurons: no multiple of a block, experts of unequal width",
        ),
        pytest.param(
            "phi",
            {"intermediate_size": 88, "expert_intermediate_sizes": [30, 21, 60]},
            4,
            id="four ranks of 22 neurons, no gate",
        ),
    ],
)
def test_layer_equals_the_reference_on_every_path(path, family, sizes, num_ranks, monkeypatch, launched):
    model = tiny_model(family, **sizes)
    ranks = Ranks(monkeypatch, num_ranks)
    layers = ranks.build(model)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(NUM_TOKENS[path], model.config.hidden_size, generator=generator)
    assert_close(ranks.run(layers, x), reference(model, x))
    assert set(launched) == {path}
    assert len(launched) == num_ranks


def test_a_layer_can_be_finished_again_after_other_weights_were_loaded(monkeypatch):
    """As ``reload_weights`` does."""
    first, second = tiny_model("llama"), tiny_model("llama", seed=5)
    ranks = Ranks(monkeypatch, 1)
    (layer,) = ranks.build(first)
    load(layer, second.model.layers[LAYER].mlp)
    layer.finish_loading()
    x = torch.randn(3, first.config.hidden_size, generator=torch.Generator().manual_seed(1))
    assert_close(ranks.run([layer], x), reference(second, x))


def test_fewer_neurons_are_seen_as_a_difference(monkeypatch):
    model = tiny_model("llama")
    ranks = Ranks(monkeypatch, 1)
    (layer,) = ranks.build(model)
    layer.weights.widths[:] -= 1
    x = torch.randn(3, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    with pytest.raises(AssertionError):
        assert_close(ranks.run([layer], x), reference(model, x))
