"""The measurements of ``tomoe tune``: its calls are real, in the interpreter; times are simulated."""

import pytest
import torch

from tomoe_vllm.diagnostics import tune
from tomoe_vllm.diagnostics.tune import LayerKind, best, measure
from tomoe_vllm.kernels.expert_mlp.reference import expert_mlp_reference
from tomoe_vllm.kernels.expert_mlp.triton import grouped
from tomoe_vllm.kernels.expert_mlp.triton.dispatch import DENSE_ONLY, LayerShape

SIZES = (1, 2, 20, 40)


@pytest.fixture(autouse=True)
def poisoned_buffers():
    """Disabled here: ``kernel_checks`` poisons new memory itself."""


@pytest.fixture(autouse=True)
def few_copies(monkeypatch):
    monkeypatch.setattr(tune, "BYTES_BETWEEN_REUSE", 1)
    monkeypatch.setattr(tune, "MIN_COPIES", 2)


def kind(num_matrices=3, dtype=torch.float16) -> LayerKind:
    shape = LayerShape(hidden_size=40, num_neurons=56, num_experts=4, width=28, num_matrices=num_matrices, dtype=dtype)
    is_phi = num_matrices == 2
    return LayerKind(shape=shape, activation="gelu_new" if is_phi else "silu", has_bias=is_phi)


def simulated(calls) -> float:
    """Run the calls; gather and grouped take half the time of dense."""
    for call in calls:
        call()
    return 0.5 if calls[0].args[-1] in ("gather", "grouped") else 1.0


@pytest.mark.parametrize("num_matrices", [3, 2])
def test_every_path_is_checked_and_timed_at_every_size(num_matrices):
    measurement = measure(kind(num_matrices), SIZES, simulated, "cpu")
    assert measurement.failures == {}
    assert {path: list(times) for path, times in measurement.seconds.items()} == {
        "vllm": [1, 2, 20, 40], "dense": [1, 2, 20, 40], "gather": [1, 2], "grouped": [20, 40],
    }  # fmt: skip
    thresholds, _ = best(measurement)
    assert (thresholds.gather_tokens, thresholds.grouped_tokens, thresholds.max_tokens) == (2, 20, 40)


def test_a_wrong_kernel_is_found_and_not_chosen(monkeypatch):
    right = grouped.expert_mlp_grouped
    monkeypatch.setattr(grouped, "expert_mlp_grouped", lambda *arguments: right(*arguments) * 1.05)
    measurement = measure(kind(), SIZES, simulated, "cpu")
    assert set(measurement.failures) == {("grouped", 20), ("grouped", 40)}
    thresholds, _ = best(measurement)
    assert thresholds.path(2) == "gather"
    assert {thresholds.path(size) for size in (20, 40)} == {"dense"}


def test_a_kernel_that_does_not_run_is_a_failure(monkeypatch):
    def fails(*arguments):
        raise RuntimeError("out of resources")

    monkeypatch.setattr(grouped, "expert_mlp_grouped", fails)
    measurement = measure(kind(), SIZES, simulated, "cpu")
    assert "out of resources" in measurement.failures["grouped", 20]
    assert measurement.seconds["grouped"] == {}
    assert best(measurement)[0].gather_tokens == 2


def test_the_baseline_is_the_dense_mlp():
    shape, x = kind().shape, torch.randn(3, 40, dtype=torch.float32)
    from tomoe_vllm.diagnostics.kernel_checks import Layer, relative_rms
    from tomoe_vllm.diagnostics.roofline import MLPShape

    mlp = MLPShape(hidden_size=40, num_neurons=56, width=28, num_experts=shape.num_experts)
    layer = Layer.random(mlp, "silu", False, torch.float32, "cpu")
    ids = torch.zeros(3, dtype=torch.int64)
    actual = tune.dense_mlp(x, layer.weights, layer.weights.down.T.contiguous(), ids, torch.ones(1, 56))
    assert max(relative_rms(actual, expert_mlp_reference(x, ids, layer.dense.to(torch.float32)))) < 1e-5


def test_nothing_gained_means_dense_only():
    measurement = measure(kind(), SIZES, lambda calls: 1.0, "cpu")
    assert best(measurement)[0] == DENSE_ONLY
