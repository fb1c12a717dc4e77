"""Decode, prefill and memory of tomoe bench: which steps are compared, on engines with known step times."""

import contextlib
from dataclasses import replace

import pytest
from transformers import LlamaConfig

from tomoe_vllm.diagnostics.bench import engine as bench_engine
from tomoe_vllm.diagnostics.bench.engine import bench_engines, rates, sample_decode, sample_prefill
from tomoe_vllm.diagnostics.bench.setup import GpuMemory, cpu_setup, cuda_setup

SECONDS = {("dense", "compiled"): 0.2, ("dense", "shipped"): 0.3, ("tomoe", "compiled"): 0.1, ("tomoe", "shipped"): 0.1}
GIB = 1 << 30
CPU = replace(cpu_setup(), batches=(4,), prompts=(100,))
GPU = replace(
    cuda_setup(
        GpuMemory(name="NVIDIA H100", total=80 * GIB, free=79 * GIB),
        {"dense": GIB, "tomoe": GIB},
        LlamaConfig(),
        "auto",
    ),
    batches=(4,),
    prompts=(100,),
)


class FakeEngine:
    """Answers as a worker does, in a time that depends on the model and its norm. The first round is slower."""

    def __init__(self, name: str, tasks: list[tuple[str, dict]], norm: str = "compiled") -> None:
        self.name, self.tasks, self.norm, self.num_starts = name, tasks, norm, 0

    def ask(self, **task) -> dict:
        self.norm = task.get("norm", self.norm)
        self.tasks.append((self.name, task))
        self.num_starts += "batch" in task
        seconds = SECONDS[self.name, self.norm] + (self.num_starts == 1)
        if "path_of" in task:
            return {"path": f"shared_{task['path_of']}"}
        num_bytes = 200 if self.name == "dense" else 100
        memory = dict.fromkeys(("allocated_bytes", "peak_bytes"), num_bytes)
        return {"step_s": seconds, "first_s": seconds, "rest_s": seconds * (task.get("new_tokens", 0) - 1)} | memory


@pytest.fixture
def tasks():
    return []


@pytest.fixture
def engines(tasks):
    return {name: FakeEngine(name, tasks) for name in ("dense", "tomoe")}


@pytest.fixture
def groups(tasks, monkeypatch):
    """Names of the engines that bench_engines started together."""
    groups = []

    @contextlib.contextmanager
    def start_engines(folders, setup):
        groups.append([*folders])
        engines = {name: FakeEngine(name, tasks, setup.norms[0]) for name in folders}
        yield engines, {name: engine.ask() for name, engine in engines.items()}
        tasks.append(("ended", {}))

    monkeypatch.setattr(bench_engine, "start_engines", start_engines)
    return groups


def medians(row: dict) -> dict:
    return {name: value["median"] for name, value in row["tokens_per_s"].items()}


def test_decode_on_a_cpu_is_relative_to_dense_with_the_compiled_norm(engines):
    row = rates(sample_decode(engines, CPU, 4, rounds=2), 4)
    assert medians(row) == pytest.approx({"dense": 20, "dense_as_shipped": 4 / 0.3, "tomoe": 40})
    assert row["ratio"] == pytest.approx(2)
    assert row["ratio_to_dense_as_shipped"] == pytest.approx(3)


def test_decode_on_a_cpu_alternates_engines_step_by_step_at_equal_context(engines, tasks):
    sample_decode(engines, CPU, 4, rounds=1)
    steps = [(name, task["norm"]) for name, task in tasks if "step" in task]
    compiled, shipped = [[(name, norm) for name in ("dense", "tomoe")] for norm in ("compiled", "shipped")]
    assert steps == (compiled + shipped) * CPU.decode_steps  # two rounds
    starts = [task for _, task in tasks if "step" not in task]
    assert starts == 4 * [
        {"prompt_tokens": 16, "batch": 4, "new_tokens": CPU.decode_steps + 1, "is_finished": False}
    ]  # fmt: skip


def test_decode_on_a_gpu_alternates_whole_rounds_and_is_relative_to_dense_as_shipped(engines, tasks):
    for engine in engines.values():
        engine.norm = "shipped"
    row = rates(sample_decode(engines, GPU, 4, rounds=2), 4)
    assert medians(row) == pytest.approx({"dense": 4 / 0.3, "tomoe": 40})
    assert row["ratio"] == pytest.approx(3)
    assert "ratio_to_dense_as_shipped" not in row
    assert [name for name, _ in tasks] == ["dense", "tomoe"] * 3
    assert all(task["is_finished"] and task["new_tokens"] == GPU.decode_steps + 1 for _, task in tasks)


def test_prefill_on_a_cpu_is_relative_to_dense_with_the_compiled_norm(engines, tasks):
    for engine in engines.values():
        engine.num_starts = 1  # the other parts have warmed up
    row = rates(sample_prefill(engines, CPU, 100, rounds=2), 100)
    assert medians(row) == pytest.approx({"dense": 500, "dense_as_shipped": 100 / 0.3, "tomoe": 1000})
    assert (row["ratio"], row["ratio_to_dense_as_shipped"]) == pytest.approx((2, 3))
    assert [(name, task["norm"]) for name, task in tasks] == 3 * [
        ("dense", "compiled"), ("tomoe", "compiled"), ("dense", "shipped"),
    ]  # fmt: skip


def test_engines_that_alternate_are_compared_row_by_row(groups, capsys):
    results = bench_engines({"dense": None, "tomoe": None}, ["decode", "prefill"], CPU)
    assert groups == [["dense", "tomoe"]]
    assert (results["decode"][0]["batch"], results["decode"][0]["path"]) == (4, "shared_4")
    assert "memory" not in results
    assert capsys.readouterr().err.splitlines()[-1] == (
        "prefill of 100 tokens: dense 500.0, ToMoE 1000.0 tokens/s (2.00 x); "
        "dense with vLLM's own norm 333.3 (3.00 x); shared_100"
    )


def test_engines_one_after_the_other_give_the_same_rows(groups, tasks):
    setup = replace(GPU, is_interleaved=False)
    apart = bench_engines({"dense": None, "tomoe": None}, ["decode", "prefill", "memory"], setup)
    assert groups == [["dense"], ["tomoe"]]
    names = [name for name, _ in tasks]
    assert names.index("ended") == names.index("tomoe") - 1, "the first engine has ended when the second one starts"
    together = bench_engines({"dense": None, "tomoe": None}, ["decode", "prefill", "memory"], GPU)
    assert groups[2:] == [["dense", "tomoe"]]
    assert apart == together
    assert apart["decode"][0]["ratio"] == apart["prefill"][0]["ratio"] == pytest.approx(3)


def test_memory_on_a_gpu_is_that_of_torch(groups, capsys):
    memory = bench_engines({"dense": None, "tomoe": None}, ["memory"], GPU)["memory"]
    ratios = {name: value for name, value in memory.items() if name.endswith("ratio")}
    assert ratios == dict.fromkeys(("loaded_allocated_ratio", "now_allocated_ratio", "now_peak_ratio"), 0.5)
    assert "allocated after loading 0.500 x" in capsys.readouterr().err
