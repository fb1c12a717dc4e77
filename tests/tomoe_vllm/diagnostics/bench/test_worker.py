"""The worker process of tomoe bench: the dense engine runs the norm kernel that was selected, with the same values."""

import gc
from contextlib import contextmanager

import pytest
import torch

from tests.parity.conftest import Engine, keep_collections_short, make_prompts
from tomoe_vllm.diagnostics.bench import worker as bench_worker
from tomoe_vllm.diagnostics.bench.checkpoints import write_dense

NORM_OPS = ("_C::rms_norm", "_C::fused_add_rms_norm")


@contextmanager
def open_worker(folder):
    """A Worker in this process; vLLM's RMSNorm is as before afterwards."""
    from vllm.model_executor.layers.layernorm import RMSNorm

    with pytest.MonkeyPatch.context() as patch:
        for name, value in (bench_worker.ENVIRONMENT | {"OMP_NUM_THREADS": "1"}).items():
            patch.setenv(name, value)
        patch.setattr(RMSNorm, "forward_cpu", RMSNorm.forward_cpu)
        keep_collections_short(patch)
        worker = bench_worker.Worker(str(folder))
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
    for compiled, shipped in zip(*completions.values(), strict=True):
        assert compiled.tokens == shipped.tokens
        torch.testing.assert_close(compiled.logprobs, shipped.logprobs, rtol=0, atol=1e-5)
