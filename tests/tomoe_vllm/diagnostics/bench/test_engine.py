"""Decode, prefill and memory of tomoe bench: which steps are compared, on engines with known step times."""

import pytest

from tomoe_vllm.diagnostics.bench import engine as bench_engine

SECONDS = {("dense", "compiled"): 0.2, ("dense", "shipped"): 0.3, ("tomoe", "compiled"): 0.1, ("tomoe", "shipped"): 0.1}


class FakeEngine:
    """Answers as a worker does, in a time that depends on the model and its norm. The first round is slower."""

    def __init__(self, name: str, tasks: list[tuple[str, dict]]) -> None:
        self.name, self.tasks, self.norm, self.num_starts = name, tasks, "compiled", 0

    def ask(self, **task) -> dict:
        self.norm = task.get("norm", self.norm)
        self.tasks.append((self.name, task))
        self.num_starts += "batch" in task
        seconds = SECONDS[self.name, self.norm] + (self.num_starts == 1)
        return {"step_s": seconds, "first_s": seconds}


@pytest.fixture
def tasks():
    return []


@pytest.fixture
def engines(tasks, monkeypatch):
    monkeypatch.setattr(bench_engine, "BATCHES", (4,))
    monkeypatch.setattr(bench_engine, "PROMPTS", (100,))
    return {name: FakeEngine(name, tasks) for name in ("dense", "tomoe")}


def medians(row: dict) -> dict:
    return {name: value["median"] for name, value in row["tokens_per_s"].items()}


def test_decode_is_relative_to_dense_with_the_compiled_norm(engines):
    (row,) = bench_engine.bench_decode(engines, rounds=2)
    assert medians(row) == pytest.approx({"dense": 20, "dense_as_shipped": 4 / 0.3, "tomoe": 40})
    assert row["ratio"] == pytest.approx(2)
    assert row["ratio_to_dense_as_shipped"] == pytest.approx(3)


def test_decode_alternates_engines_step_by_step_at_equal_context(engines, tasks):
    bench_engine.bench_decode(engines, rounds=1)
    steps = [(name, task["norm"]) for name, task in tasks if "step" in task]
    compiled, shipped = [[(name, norm) for name in ("dense", "tomoe")] for norm in ("compiled", "shipped")]
    assert steps == (compiled + shipped) * bench_engine.DECODE_STEPS  # two rounds
    starts = [task for _, task in tasks if "step" not in task]
    assert starts == [{"prompt_tokens": 16, "batch": 4, "new_tokens": bench_engine.DECODE_STEPS + 1}] * 4


def test_prefill_is_relative_to_dense_with_the_compiled_norm(engines, tasks, capsys):
    for engine in engines.values():
        engine.num_starts = 1  # the other parts have warmed up
    (row,) = bench_engine.bench_prefill(engines, rounds=2)
    assert medians(row) == pytest.approx({"dense": 500, "dense_as_shipped": 100 / 0.3, "tomoe": 1000})
    assert (row["ratio"], row["ratio_to_dense_as_shipped"]) == pytest.approx((2, 3))
    assert [(name, task["norm"]) for name, task in tasks] == 3 * [
        ("dense", "compiled"), ("tomoe", "compiled"), ("dense", "shipped"),
    ]  # fmt: skip
    assert capsys.readouterr().err == (
        "prefill of 100 tokens: dense 500.0, ToMoE 1000.0 tokens/s (2.00 x); "
        "dense with vLLM's own norm 333.3 (3.00 x)\n"
    )
