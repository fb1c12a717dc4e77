"""The random checkpoints of tomoe bench."""

import pytest
import torch

from tests.parity.conftest import make_prompts, start_engine
from tomoe_vllm.diagnostics.bench.checkpoints import write_dense, write_tomoe


@pytest.mark.engine
def test_random_checkpoints_load_and_differ(tiny_shape, tmp_path):
    write_dense(tiny_shape, tmp_path / "dense")
    write_tomoe(tmp_path / "dense", tmp_path / "tomoe")
    outputs = {}
    for name in ("dense", "tomoe"):
        with start_engine(tmp_path / name) as engine:
            outputs[name] = engine.complete(make_prompts(tiny_shape.vocab_size)[:3])
    assert all(torch.isfinite(c.logprobs).all() for both in outputs.values() for c in both)
    assert [c.tokens for c in outputs["dense"]] != [c.tokens for c in outputs["tomoe"]]
