"""The worker process of tomoe bench: the dense engine runs the norm kernel that was selected, with the same values."""

import gc
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from tests.parity.conftest import Engine, keep_collections_short, make_prompts
from tomoe_vllm.diagnostics.bench import worker as bench_worker
from tomoe_vllm.diagnostics.bench.checkpoints import write_dense, write_tomoe
from tomoe_vllm.diagnostics.bench.engine import bench_engines
from tomoe_vllm.diagnostics.bench.setup import cpu_setup

NORM_OPS = ("_C::rms_norm", "_C::fused_add_rms_norm")


@contextmanager
def open_worker(folder):
    """A Worker in this process; vLLM's RMSNorm is as before afterwards."""
    from vllm.model_executor.layers.layernorm import RMSNorm

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (cpu_setup().environment | {"OMP_NUM_THREADS": "1"}).items():
            patch.setenv(name, value)
        patch.setattr(RMSNorm, "forward_cpu", RMSNorm.forward_cpu)
        keep_collections_short(patch)
        worker = bench_worker.Worker(str(folder), "cpu", cpu_setup().arguments)
        try:
            yield worker
        finally:
            worker.engine.engine_core.shutdown()
            del worker
            gc.collect()


def count_norms(worker, **task) -> list[int]:
    """Calls of each compiled norm in one step of a new sequence."""
    worker.run({"prompt_tokens": 8, "batch": 2, "new_tokens": 2})
    with torch.profiler.profile() as profile:
        assert worker.run({"step": 1} | task)["step_s"] > 0
    return [sum(event.name == name for event in profile.events()) for name in NORM_OPS]


@pytest.mark.engine
def test_dense_engine_runs_the_norm_that_was_selected(tiny_shape, tmp_path):
    write_dense(tiny_shape, tmp_path / "dense")
    with open_worker(tmp_path / "dense") as worker:
        engine = object.__new__(Engine)
        engine.llm = worker.llm
        completions = {}
        assert count_norms(worker) == [1, 4], "compiled is the default; two layers have five norms"
        for norm, expected in (("shipped", [0, 0]), ("compiled", [1, 4])):
            assert count_norms(worker, norm=norm) == expected
            completions[norm] = engine.complete(make_prompts(tiny_shape.vocab_size)[:3])
        assert worker.run({}) == worker.run({"trim": 1}) == {}
        assert worker.run({"path_of": 4}) == {"path": None}, "a dense model"
    for compiled, shipped in zip(*completions.values(), strict=True):
        assert compiled.tokens == shipped.tokens
        torch.testing.assert_close(compiled.logprobs, shipped.logprobs, rtol=0, atol=1e-5)


@pytest.mark.slow
@pytest.mark.engine
def test_engines_run_one_after_the_other_as_on_a_gpu_that_holds_one_model(tiny_shape, tmp_path, capfd):
    """The mode for large models on GPUs, with its asynchronous scheduling and round-wise times; in float32, eager."""
    write_dense(tiny_shape, tmp_path / "dense")
    write_tomoe(tmp_path / "dense", tmp_path / "tomoe")
    setup = cpu_setup("sequential")
    arguments = setup.arguments | {"async_scheduling": True, "kv_cache_memory_bytes": 1 << 26}
    environment = setup.environment | {"OMP_NUM_THREADS": "1"}
    setup = replace(setup, arguments=arguments, environment=environment, is_stepwise=False, norms=("shipped",))
    setup = replace(setup, batches=(1, 4), prompts=(64,), decode_steps=8)
    folders = {name: tmp_path / name for name in ("dense", "tomoe")}
    results = bench_engines(folders, ["decode", "prefill", "memory"], setup)
    assert [row["batch"] for row in results["decode"]] == [1, 4]
    assert {row["path"] for part in ("decode", "prefill") for row in results[part]} <= {"shared_rows", "masked"}
    assert all(row["tokens_per_s"].keys() == {"dense", "tomoe"} for row in results["decode"] + results["prefill"])
    assert results["memory"]["tomoe"]["now"]["resident_bytes"] > 0
    assert "ToMoE expert layout: " in capfd.readouterr().err
