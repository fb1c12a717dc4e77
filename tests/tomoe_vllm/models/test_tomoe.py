"""What the model class refuses before it builds anything, and after a reload that failed. Its output: tests/parity."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn


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


def test_a_model_whose_masks_could_not_be_set_does_not_run():
    """The weights of all layers are new then, and the masks of some are old."""
    from tomoe_vllm.models.tomoe import ToMoEForCausalLM

    def refuse() -> None:
        raise ValueError("restart it on the new checkpoint")

    model = ToMoEForCausalLM.__new__(ToMoEForCausalLM)
    nn.Module.__init__(model)
    layer = SimpleNamespace(
        self_attn=SimpleNamespace(finish_loading=lambda: None), mlp=SimpleNamespace(finish_loading=refuse)
    )
    model.loader = SimpleNamespace(finish=lambda: True, failure=None)
    object.__setattr__(model, "model", SimpleNamespace(layers=[layer], start_layer=0, end_layer=1))
    with pytest.raises(ValueError, match="restart it"):
        model.finish_loading()
    with pytest.raises(RuntimeError, match=r"reloading the weights failed \(restart it on the new checkpoint\)"):
        model.compute_logits(torch.zeros(1, 4))
