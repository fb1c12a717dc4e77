"""What the model class refuses before it builds anything. Its output: tests/parity."""

from types import SimpleNamespace

import pytest


def test_batch_invariance_on_a_gpu_is_refused(monkeypatch):
    from tomoe_vllm.models import tomoe

    monkeypatch.setattr(tomoe, "current_platform", SimpleNamespace(is_cuda=lambda: True))
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    config = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=None),
        parallel_config=SimpleNamespace(enable_expert_parallel=False),
        load_config=SimpleNamespace(load_format="auto"),
    )
    with pytest.raises(ValueError, match=r"VLLM_BATCH_INVARIANT is set, .* Unset it"):
        tomoe.ToMoEForCausalLM(vllm_config=config)
