"""The measurements of ``tomoe tune``: its kernels run in the interpreter; times are simulated."""

import json

import pytest
import torch

from tomoe_vllm.diagnostics import kernel_checks, tune
from tomoe_vllm.diagnostics.device import InterpretedDevice
from tomoe_vllm.diagnostics.tune import LayerKind, best, measure
from tomoe_vllm.kernels.expert_mlp.triton import dispatch, grouped
from tomoe_vllm.kernels.expert_mlp.triton.dispatch import DENSE_ONLY, LayerShape

SIZES = (1, 2, 20, 40)


@pytest.fixture(autouse=True)
def poisoned_buffers():
    """Disabled here: ``kernel_checks`` poisons new memory itself."""


class SimulatedDevice(InterpretedDevice):
    """A dense step takes 1 ms, and one of ``gather`` or ``grouped`` half of it, or ``sparse_ms``."""

    def __init__(self, monkeypatch, sparse_ms: float = 0.5) -> None:
        self.path: str | None = None
        self.sparse_ms = sparse_ms
        run = kernel_checks.expert_mlp_cuda

        def recorded(x, ids, weights, path):
            self.path = path
            return run(x, ids, weights, path)

        monkeypatch.setattr(kernel_checks, "expert_mlp_cuda", recorded)

    def capture(self, run):
        self.path = None
        return super().capture(run)

    def milliseconds(self, graph, rounds=20) -> float:
        return self.sparse_ms if self.path in ("gather", "grouped") else 1.0


def kind(num_matrices=3) -> LayerKind:
    shape = LayerShape(
        hidden_size=40, num_neurons=56, num_experts=4, width=28, num_matrices=num_matrices, dtype=torch.float16
    )
    is_phi = num_matrices == 2
    return LayerKind(shape=shape, activation="gelu_new" if is_phi else "silu", has_bias=is_phi)


@pytest.mark.parametrize("num_matrices", [3, 2])
def test_every_path_is_checked_and_timed_at_every_size(num_matrices, monkeypatch):
    measurement = measure(kind(num_matrices), SIZES, SimulatedDevice(monkeypatch))
    assert measurement.failures == {}
    assert measurement.ms == {
        "vllm": dict.fromkeys(SIZES, 1.0),
        "dense": dict.fromkeys(SIZES, 1.0),
        "gather": {1: 0.5, 2: 0.5},
        "grouped": {20: 0.5, 40: 0.5},
    }
    thresholds, _ = best(measurement)
    assert (thresholds.gather_tokens, thresholds.grouped_tokens, thresholds.max_tokens) == (2, 20, 40)


def test_a_wrong_kernel_is_found_and_not_chosen(monkeypatch):
    right = grouped.expert_mlp_grouped
    monkeypatch.setattr(grouped, "expert_mlp_grouped", lambda *arguments: right(*arguments) * 1.05)
    measurement = measure(kind(), SIZES, SimulatedDevice(monkeypatch))
    assert set(measurement.failures) == {("grouped", 20), ("grouped", 40)}
    thresholds, _ = best(measurement)
    assert thresholds.path(2) == "gather"
    assert {thresholds.path(size) for size in (20, 40)} == {"dense"}


def test_a_kernel_that_does_not_run_is_a_failure(monkeypatch):
    def fails(*arguments):
        raise RuntimeError("out of resources")

    monkeypatch.setattr(grouped, "expert_mlp_grouped", fails)
    measurement = measure(kind(), SIZES, SimulatedDevice(monkeypatch))
    assert "out of resources" in measurement.failures["grouped", 20]
    assert measurement.ms["grouped"] == {}
    assert best(measurement)[0].gather_tokens == 2


def test_tokens_are_spread_evenly_over_the_experts(monkeypatch):
    """A random draw of two tokens may use one expert only, which would make gather look faster than it is."""
    drawn = []
    run = kernel_checks.expert_mlp_cuda
    monkeypatch.setattr(
        kernel_checks, "expert_mlp_cuda", lambda x, ids, *others: drawn.append(ids.clone()) or run(x, ids, *others)
    )
    measure(kind(), [3], SimulatedDevice(monkeypatch))
    assert {len(set(ids.tolist())) for ids in drawn} == {3}


def test_nothing_gained_means_dense_only(monkeypatch):
    measurement = measure(kind(), SIZES, SimulatedDevice(monkeypatch, sparse_ms=1.0))
    assert best(measurement)[0] == DENSE_ONLY


def test_the_tables_that_tune_writes_are_those_the_op_reads(monkeypatch, tmp_path):
    """The whole command on a simulated GPU, but for the command line."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dispatch, "device_name", lambda: "Some GPU")
    monkeypatch.setattr(tune, "CudaDevice", lambda: SimulatedDevice(monkeypatch))
    monkeypatch.setenv(dispatch.FOLDER_VARIABLE, str(tmp_path))
    dispatch.load_thresholds.cache_clear()
    result = tune.tune([kind()], None, 20)
    expected = dispatch.Thresholds(gather_tokens=8, grouped_tokens=16, max_tokens=20)
    assert dispatch.load_thresholds(kind().shape) == expected
    dispatch.load_thresholds.cache_clear()
    assert result["files"] == [str(dispatch.table_file(kind().shape))]
    (layer,) = result["layers"]
    assert (layer["gather_tokens"], layer["failures"]) == (8, [])
    assert layer["reason"] == "2.00 x vLLM's dense MLP at 1 tokens"
    json.dumps(result)
