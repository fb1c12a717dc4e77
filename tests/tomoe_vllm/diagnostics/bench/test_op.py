"""The op part of tomoe bench: paths agree before they are timed, with the same draws, at different layers."""

import json

import pytest
import torch

from tomoe_vllm.diagnostics.bench.op import NUM_DRAWS, call_with, draw_experts, walk
from tomoe_vllm.kernels import build


@pytest.mark.engine
def test_paths_must_agree_before_they_are_timed(tiny_shape, monkeypatch):
    if build.compiler() is None:
        pytest.skip("no C++ compiler")
    from tomoe_vllm.diagnostics.bench import op

    monkeypatch.setattr(op, "NUM_TOKENS", (1, 5))
    monkeypatch.setattr(op, "read_bandwidth", lambda: 1e9)
    monkeypatch.setattr(op, "gemm_rate", lambda: 1e12)
    monkeypatch.setattr(op, "rounds_of", lambda *_: 2)
    results = op.bench_op(tiny_shape)
    assert [row["num_tokens"] for row in results["rows"]] == [1, 5]
    assert set(results["rows"][0]["ms"]) == {"dense", "shared", "masked", "fused"}
    assert results["rows"][0]["limit_ms"] == pytest.approx(3 * 4 * 128 * 48 / 1e9 * 1e3)
    json.dumps(results)
    wrong = op.Layer.shared
    monkeypatch.setattr(op.Layer, "shared", lambda self, *args: wrong(self, *args) * 1.001)
    with pytest.raises(RuntimeError, match="shared differs from the masked path"):
        op.bench_op(tiny_shape, ("dense", "masked", "shared"))


def test_each_path_gets_the_same_draws_in_the_same_order():
    draws = draw_experts(8, 5, torch.Generator().manual_seed(0))
    assert len(draws) == NUM_DRAWS
    assert len({tuple(draw.tolist()) for draw in draws}) == NUM_DRAWS
    calls = [call_with(lambda layer, x, ids, path=path: (path, layer, x, ids), "x", draws) for path in "ab"]
    for i in range(NUM_DRAWS + 1):
        assert [call(i) for call in calls] == [(path, i, "x", draws[i % NUM_DRAWS]) for path in "ab"]


def test_no_two_paths_are_at_the_same_layer():
    calls = walk({name: lambda layer: layer for name in "abc"}, [*range(7)])
    rounds = [[call() for call in calls.values()] for _ in range(8)]
    assert rounds == [[i % 7, (i + 2) % 7, (i + 4) % 7] for i in range(8)]
