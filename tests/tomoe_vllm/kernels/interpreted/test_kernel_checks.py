"""The checks of ``tomoe doctor`` detect broken kernels. CUDA graphs and timing are simulated; the kernels are real."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tomoe_vllm.diagnostics import kernel_checks
from tomoe_vllm.diagnostics.kernel_checks import Layer, run_check, run_checks, uninitialized_is_nan
from tomoe_vllm.diagnostics.roofline import Chip, MLPShape
from tomoe_vllm.kernels.expert_mlp.triton import gather, grouped

SHAPE = MLPShape(hidden_size=40, num_neurons=56, width=28)
CHIP = Chip(name="simulated", bandwidth=1e12, flops=1e14)


@pytest.fixture(autouse=True)
def poisoned_buffers():
    """Disabled here: the poisoning of ``kernel_checks`` itself is tested."""


@pytest.fixture
def layer() -> Layer:
    return Layer.random(SHAPE, "silu", False, torch.float32, "cpu")


@pytest.fixture
def graphs(monkeypatch):
    """Simulated CUDA graphs: replaying one runs the function again, unless ``graphs.is_frozen``."""
    state = SimpleNamespace(is_frozen=False)

    def capture(run):
        output = run()
        return SimpleNamespace(replay=lambda: None if state.is_frozen else output.copy_(run())), output

    monkeypatch.setattr(kernel_checks, "capture", capture)
    monkeypatch.setattr(kernel_checks, "median_ms", lambda graph: 2.0)
    return state


def test_random_layer_has_experts_of_unequal_width(layer):
    assert len(set(layer.weights.widths.tolist())) > 1
    assert layer.dense.masks.all()


@pytest.mark.parametrize(("num_matrices", "has_bias", "activation"), [(3, False, "silu"), (2, True, "gelu_new")])
def test_all_paths_agree(num_matrices, has_bias, activation):
    shape = MLPShape(hidden_size=40, num_neurons=56, width=28, num_matrices=num_matrices)
    checks = run_checks(shape, activation, has_bias, [torch.float32, torch.float16], "cpu", None)
    assert {check.path for check in checks} == {"gather", "dense", "grouped"}
    assert {check.routing for check in checks} == {"random", "one expert"}
    assert [check.describe() for check in checks if not check.agrees] == []
    assert all(check.overall > 0 and check.ms is None for check in checks)


def test_on_a_gpu_each_path_is_timed_and_compared_with_dense_and_the_roofline(layer, graphs):
    check = run_check(layer, "gather", 2, "random", CHIP)
    assert check.agrees, check.describe()
    assert (check.ms, check.dense_ms) == (2.0, 2.0)
    assert check.roofline_ms > 0


def test_a_graph_that_ignores_new_expert_ids_disagrees(layer, graphs):
    graphs.is_frozen = True
    check = run_check(layer, "grouped", 5, "random", CHIP)
    assert not check.agrees
    assert check.worst_row > 0.1


@pytest.mark.parametrize("path", ["gather", "grouped"])
@pytest.mark.parametrize("fault", ["a row of NaN", "one row index wrong", "raises"])
def test_a_broken_kernel_disagrees(layer, monkeypatch, path, fault):
    module = {"gather": gather, "grouped": grouped}[path]
    kernel = getattr(module, f"expert_mlp_{path}")

    def broken(hidden_states, expert_ids, weights):
        if fault == "raises":
            raise RuntimeError("out of resource: shared memory")
        if fault == "one row index wrong":
            neuron_ids = weights.neuron_ids.clone()
            neuron_ids[expert_ids[0], 3] = neuron_ids[expert_ids[0], 2]
            weights = replace(weights, neuron_ids=neuron_ids)
        output = kernel(hidden_states, expert_ids, weights)
        return output.index_fill(0, torch.tensor([0]), torch.nan) if fault == "a row of NaN" else output

    monkeypatch.setattr(module, f"expert_mlp_{path}", broken)
    check = run_check(layer, path, 3, "random", None)
    assert not check.agrees
    assert ("out of resource" in check.describe()) == (fault == "raises")


def test_unwritten_memory_is_nan():
    with uninitialized_is_nan():
        made = [torch.empty(3), torch.zeros(1).new_empty(3), torch.empty_like(torch.zeros(3))]
    assert all(tensor.isnan().all() for tensor in made)
    assert not torch.are_deterministic_algorithms_enabled()
