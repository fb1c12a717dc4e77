"""The checks of ``tomoe doctor`` detect broken kernels. CUDA graphs and timing are simulated; the kernels are real."""

from dataclasses import replace

import pytest
import torch

from tomoe_vllm.diagnostics.device import Graph, InterpretedDevice
from tomoe_vllm.diagnostics.kernel_checks import Layer, relative_rms, run_check, run_checks, uninitialized_is_nan
from tomoe_vllm.diagnostics.roofline import Chip, MLPShape
from tomoe_vllm.kernels.expert_mlp.triton import gather, grouped

SHAPE = MLPShape(hidden_size=40, num_neurons=56, width=28)
CHIP = Chip(name="simulated", bandwidth=1e12, flops=1e14)
PLAIN = InterpretedDevice()


class TimedDevice(InterpretedDevice):
    """Every graph takes 2 ms; one that ``is_frozen`` ignores its inputs."""

    def __init__(self, is_frozen=False):
        self.is_frozen, self.num_timed = is_frozen, 0

    def capture(self, run):
        graph = super().capture(run)
        return Graph(lambda: None, graph.output) if self.is_frozen else graph

    def milliseconds(self, graph, rounds=20):
        self.num_timed += 1
        return 2.0


@pytest.fixture(autouse=True)
def poisoned_buffers():
    """Disabled here: the poisoning of ``kernel_checks`` itself is tested."""


@pytest.fixture
def layer() -> Layer:
    return Layer.random(SHAPE, "silu", False, torch.float32, "cpu")


def test_random_layer_has_experts_of_unequal_width(layer):
    assert len(set(layer.weights.widths.tolist())) > 1


@pytest.mark.parametrize(("num_matrices", "has_bias", "activation"), [(3, False, "silu"), (2, True, "gelu_new")])
def test_all_paths_agree(num_matrices, has_bias, activation):
    shape = MLPShape(hidden_size=40, num_neurons=56, width=28, num_matrices=num_matrices)
    dtypes = (torch.float32, torch.float16)
    layers = [Layer.random(shape, activation, has_bias, dtype, "cpu") for dtype in dtypes]
    checks = run_checks(layers, dict.fromkeys(dtypes, (1, 5)), PLAIN)
    assert {check.path for check in checks} == {"gather", "dense", "grouped"}
    assert {check.routing for check in checks} == {"random", "one expert"}
    assert [check.describe() for check in checks if not check.agrees] == []
    assert all(check.overall > 0 and check.ms is None for check in checks)


@pytest.mark.parametrize(("num_matrices", "has_bias", "activation"), [(3, False, "silu"), (2, True, "gelu_new")])
def test_dense_baseline_is_the_dense_mlp(num_matrices, has_bias, activation):
    shape = MLPShape(hidden_size=40, num_neurons=56, width=28, num_matrices=num_matrices)
    layer = Layer.random(shape, activation, has_bias, torch.float32, "cpu")
    hidden_states, _ = layer.inputs(5)
    everything = replace(layer, weights=replace(layer.weights, masks=torch.ones_like(layer.weights.masks)))
    no_experts = torch.zeros(5, dtype=torch.int64)
    expected = everything.expected(hidden_states, no_experts)
    assert max(relative_rms(layer.dense_mlp(hidden_states, no_experts), expected)) < 1e-5


def test_on_a_gpu_each_path_is_timed_and_compared_with_dense_and_the_roofline():
    layer, device = Layer.random(SHAPE, "silu", False, torch.float16, "cpu"), TimedDevice()
    for path in ("gather", "grouped"):
        check = run_check(layer, path, 2, "random", device, CHIP)
        assert check.agrees, check.describe()
        assert (check.ms, check.dense_ms) == (2.0, 2.0)
        assert check.roofline_ms > 0
    assert device.num_timed == 3, "dense is timed once for a number of tokens"


def test_float32_has_no_roofline_because_the_chips_flop_rate_is_that_of_16_bit_types(layer):
    check = run_check(layer, "gather", 2, "random", TimedDevice(), CHIP)
    assert (check.ms, check.roofline_ms) == (2.0, None)


def test_a_graph_that_ignores_new_expert_ids_disagrees(layer):
    check = run_check(layer, "grouped", 5, "random", TimedDevice(is_frozen=True), CHIP)
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
    check = run_check(layer, path, 3, "random", PLAIN)
    assert not check.agrees
    assert ("out of resource" in check.describe()) == (fault == "raises")


def test_unwritten_memory_is_nan():
    with uninitialized_is_nan():
        made = [torch.empty(3), torch.zeros(1).new_empty(3), torch.empty_like(torch.zeros(3))]
    assert all(tensor.isnan().all() for tensor in made)
    assert not torch.are_deterministic_algorithms_enabled()
