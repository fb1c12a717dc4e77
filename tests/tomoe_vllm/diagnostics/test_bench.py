"""tomoe bench and tune: their arithmetic, their input errors, and that what they measure is what they say."""

import json

import pytest
import torch

from tests.parity.conftest import make_prompts, start_engine
from tomoe_vllm.diagnostics.bench.checkpoints import write_dense, write_tomoe
from tomoe_vllm.diagnostics.bench.measure import interleave, summary
from tomoe_vllm.diagnostics.bench.shapes import SHAPES, Shape, shape_of
from tomoe_vllm.diagnostics.tune import NEVER, best
from tomoe_vllm.kernels import build
from tomoe_vllm.kernels.expert_mlp.triton.thresholds import SHIPPED_FOLDER

TINY = Shape(
    hidden_size=128, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, vocab_size=96
)


def test_shape_of_7b_layer_has_the_bytes_of_the_paper():
    assert SHAPES["7b-layer"].mlp_bytes == 2 * 270_532_608  # 270.5 MB in bfloat16


def test_unknown_shape_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match="shape is '2b'; it must be one of 135m, 1b, 7b-layer"):
        shape_of("2b")


def test_ways_take_turns_in_changing_order_and_warm_up_is_not_counted():
    order = []
    samples = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=40, warm_up=10)
    rounds = [order[i : i + 2] for i in range(0, len(order), 2)]
    assert len(rounds) == 50
    assert {tuple(sorted(pair)) for pair in rounds} == {("a", "b")}, "each once in each round"
    assert 10 < rounds.count(["a", "b"]) < 40
    assert [len(values) for values in samples.values()] == [40, 40]


def test_summary_is_median_and_quartiles():
    assert summary([1.0, 2.0, 3.0, 4.0, 5.0], 10) == {"median": 30.0, "low": 15.0, "high": 45.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "speed"], "--only is 'speed'; it must be one of op, decode, prefill, memory"),
        (["--shape", "2b"], "shape is '2b'"),
        (["--tomoe", "x"], "--tomoe needs the dense model"),
        (["--out", "."], "exists; name a folder that does not"),
    ],
)
def test_misuse_is_one_line(run_cli, arguments, message):
    code, out, err = run_cli("bench", *arguments)
    assert (code, out) == (2, "")
    assert message in err


@pytest.mark.engine
def test_checkpoints_load_and_differ(tmp_path):
    write_dense(TINY, tmp_path / "dense")
    write_tomoe(tmp_path / "dense", tmp_path / "tomoe")
    outputs = {}
    for name in ("dense", "tomoe"):
        with start_engine(tmp_path / name) as engine:
            outputs[name] = engine.complete(make_prompts(96)[:3])
    assert all(torch.isfinite(c.logprobs).all() for both in outputs.values() for c in both)
    assert [c.tokens for c in outputs["dense"]] != [c.tokens for c in outputs["tomoe"]]


@pytest.mark.engine
def test_ways_of_the_op_agree_before_they_are_timed(monkeypatch):
    if build.compiler() is None:
        pytest.skip("no C++ compiler")
    from tomoe_vllm.diagnostics.bench import op

    monkeypatch.setattr(op, "NUM_TOKENS", (1, 5))
    monkeypatch.setattr(op, "read_bandwidth", lambda: 1e9)
    monkeypatch.setattr(op, "gemm_rate", lambda: 1e12)
    monkeypatch.setattr(op, "rounds_of", lambda *_: 2)
    results = op.bench_op(TINY)
    assert [row["num_tokens"] for row in results["rows"]] == [1, 5]
    assert set(results["rows"][0]["ms"]) == {"dense", "shared", "masked", "fused"}
    assert results["rows"][0]["limit_ms"] == pytest.approx(3 * 4 * 128 * 48 / 1e9 * 1e3)
    json.dumps(results)
    wrong = op.Layer.shared
    monkeypatch.setattr(op.Layer, "shared", lambda self, *args: wrong(self, *args) * 1.001)
    with pytest.raises(RuntimeError, match="shared differs from the masked form"):
        op.bench_op(TINY, ("dense", "masked", "shared"))


def test_each_way_takes_the_same_draws_in_turn():
    from tomoe_vllm.diagnostics.bench.op import NUM_DRAWS, call_with, draw_experts

    draws = draw_experts(8, 5, torch.Generator().manual_seed(0))
    assert len(draws) == NUM_DRAWS
    assert len({tuple(draw.tolist()) for draw in draws}) == NUM_DRAWS
    calls = [call_with(lambda layer, x, ids, way=way: (way, layer, x, ids), "x", draws) for way in "ab"]
    for i in range(NUM_DRAWS + 1):
        assert [call(i) for call in calls] == [(way, i, "x", draws[i % NUM_DRAWS]) for way in "ab"]


def test_each_way_is_at_another_layer():
    from tomoe_vllm.diagnostics.bench.op import walk

    ways = walk({name: lambda layer: layer for name in "abc"}, [*range(7)])
    assert [[way() for way in ways.values()] for _ in range(8)] == [[i % 7, (i + 2) % 7, (i + 4) % 7] for i in range(8)]


@pytest.mark.parametrize(
    ("gather", "grouped", "expected"),
    [
        pytest.param([0.5, 0.7, 1.1, 3.0], [3.0, 2.0, 0.9, 0.5], (2, 256), id="as the cost model has it"),
        pytest.param([1.0, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 1.0], (0, NEVER), id="not better at the end: never"),
        pytest.param([0.5, 0.5, 0.5, 0.5], [0.4, 0.4, 0.4, 0.4], (1024, NEVER), id="gather is asked first"),
        pytest.param([0.5, 2.0, 0.5, 2.0], [2.0, 0.5, 2.0, 0.5], (1, 1024), id="one fast point proves nothing"),
    ],
)
def test_tuning_leaves_the_masked_way_only_where_another_was_faster(gather, grouped, expected):
    sizes = (1, 2, 256, 1024)
    times = {"masked": dict.fromkeys(sizes, 1.0)}
    times |= {
        name: dict(zip(sizes, values, strict=True)) for name, values in (("gather", gather), ("grouped", grouped))
    }
    thresholds = best(times)
    assert (thresholds.gather_tokens, thresholds.grouped_tokens) == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune")
def test_tuning_a_cpu_is_misuse(run_cli, tmp_path):
    code, out, err = run_cli("tune", "--out", tmp_path)
    assert (code, out) == (2, "")
    assert "tomoe tune needs a GPU; on CPUs one way serves every number of tokens" in err


def test_a_gpu_that_was_not_measured_takes_the_masked_way():
    values = json.loads((SHIPPED_FOLDER / "default.json").read_text())
    assert values["gather_tokens"] == 0
    assert values["grouped_tokens"] >= NEVER
