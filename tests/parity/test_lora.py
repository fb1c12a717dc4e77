"""LoRA adapters on a ToMoE model give the same output as weights with the adapter merged."""

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.tiny_models import save_tiny_model, tiny_model
from tests.parity.conftest import max_logprob_difference, start_engine
from tests.parity.test_families import LOGPROB_LIMIT

pytestmark = pytest.mark.engine

RANK = 4
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "phi": ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"],
}


def save_adapter(folder, model, targets) -> None:
    """Write a random PEFT adapter in ``folder`` and merge it into ``model``."""
    generator, tensors = torch.Generator().manual_seed(3), {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in targets:
            down = torch.randn(RANK, module.in_features, generator=generator) * module.in_features**-0.5
            up = torch.randn(module.out_features, RANK, generator=generator) * 0.5
            tensors |= {f"base_model.model.{name}.lora_A.weight": down, f"base_model.model.{name}.lora_B.weight": up}
            module.weight.data += up @ down
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("family", TARGETS)
def test_adapter_equals_merged_weights(tmp_path, prompts, family):
    from vllm.lora.request import LoRARequest

    base, merged = save_tiny_model(tmp_path / "base", family), tiny_model(family)
    save_adapter(tmp_path / "adapter", merged, TARGETS[family])
    request = LoRARequest("adapter", 1, str(tmp_path / "adapter"))
    with start_engine(tmp_path / "base", enable_lora=True, max_lora_rank=8) as engine:
        # No prompt logprobs: with LoRA, vLLM 0.32's CPU build fails (bgmv_shrink), on its own models too.
        adapted = engine.complete(prompts[:6], prompt_logprobs=None, lora_request=request)
        plain = engine.complete(prompts[:6], prompt_logprobs=None)
    assert max_logprob_difference(merged, adapted) < LOGPROB_LIMIT
    assert max_logprob_difference(base, plain) < LOGPROB_LIMIT
    assert max_logprob_difference(base, adapted) > 100 * LOGPROB_LIMIT
