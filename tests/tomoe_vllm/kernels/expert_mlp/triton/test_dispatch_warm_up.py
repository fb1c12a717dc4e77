"""The warm-up launches every kernel binary that any step of the engine can launch. Nothing runs: tensors are meta."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is in the dev extra")

from tests.helpers.triton_compile import recorded_launches, specialization
from tomoe_vllm.kernels.expert_mlp.triton import dispatch
from tomoe_vllm.kernels.expert_mlp.triton.dispatch import Thresholds, expert_mlp_cuda, warm_up, warm_up_sizes
from tomoe_vllm.kernels.ops import ExpertTensors

MAX_TOKENS = 700
"""More than 64 tokens for each of 8 experts: all rows of ``grouped_config``."""


@pytest.fixture(autouse=True)
def nothing_warmed_up(monkeypatch):
    monkeypatch.setattr(dispatch, "_warmed_up", set())


def layer(hidden_size=64, num_neurons=96, width=48, dtype=torch.bfloat16, has_bias=False) -> ExpertTensors:
    def meta(*shape, dtype=dtype):
        return torch.empty(shape, dtype=dtype, device="meta")

    return ExpertTensors(
        up=meta(2 * num_neurons, hidden_size),
        up_bias=meta(2 * num_neurons) if has_bias else None,
        down=meta(num_neurons, hidden_size),
        masks=meta(8, num_neurons),
        neuron_ids=meta(8, width, dtype=torch.int32),
        widths=meta(8, dtype=torch.int32),
        activation="silu",
    )


def set_thresholds(monkeypatch, *values: int) -> None:
    names = ("gather_tokens", "grouped_tokens", "max_tokens")
    tuned = Thresholds(**dict(zip(names, values, strict=True)))
    monkeypatch.setattr(dispatch, "load_thresholds", lambda shape: tuned)


def binaries(monkeypatch, run) -> set[str]:
    """What Triton's launcher would compile for the launches of ``run()``."""
    with recorded_launches(monkeypatch) as launches:
        run()
    return {f"{n.kernel.__name__} {specialization(n)} {sorted(n.options.items())}" for n in launches}


def all_steps(weights: ExpertTensors) -> None:
    for num_tokens in range(1, MAX_TOKENS + 1):
        x = torch.empty(num_tokens, weights.up.shape[1], dtype=weights.up.dtype, device="meta")
        expert_mlp_cuda(x, torch.empty(num_tokens, dtype=torch.int64, device="meta"), weights)


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({}, id="multiples of 16"),
        pytest.param({"hidden_size": 36, "num_neurons": 43, "width": 22}, id="nothing is a multiple of 16"),
        pytest.param({"num_neurons": 86, "width": 43, "has_bias": True}, id="share of a tensor-parallel rank, bias"),
        pytest.param({"dtype": torch.float32}, id="float32: one grouped config"),
    ],
)
@pytest.mark.parametrize("thresholds", [(6, 20, MAX_TOKENS), (3, 300, 600), (0, dispatch.NEVER, 0)], ids=str)
def test_no_step_compiles_after_the_warm_up(monkeypatch, sizes, thresholds):
    set_thresholds(monkeypatch, *thresholds)
    weights = layer(**sizes)
    warmed = binaries(monkeypatch, lambda: warm_up(weights, MAX_TOKENS))
    reached = binaries(monkeypatch, lambda: all_steps(weights))
    assert reached - warmed == set()


def test_it_launches_few_sizes(monkeypatch):
    set_thresholds(monkeypatch, 2, 20, MAX_TOKENS)
    assert warm_up_sizes(layer(), MAX_TOKENS) == [1, 2, 3, 20, 129, 513]
    assert warm_up_sizes(layer(), 100) == [1, 2, 3, 20]


def test_layers_of_one_shape_are_warmed_up_once(monkeypatch):
    set_thresholds(monkeypatch, 2, 20, MAX_TOKENS)
    assert binaries(monkeypatch, lambda: warm_up(layer(), MAX_TOKENS))
    assert not binaries(monkeypatch, lambda: warm_up(layer(), MAX_TOKENS))
    assert binaries(monkeypatch, lambda: warm_up(layer(width=40), MAX_TOKENS)), "another width is another binary"
