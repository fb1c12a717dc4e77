"""Options of a config, one engine each, against the Hugging Face reference."""

import pytest
import torch

from tests.helpers.tiny_models import save_tiny_model
from tests.parity.conftest import logprob_differences, max_logprob_difference, reference_completion, start_engine
from tests.parity.test_families import LOGPROB_LIMIT

pytestmark = pytest.mark.engine

ALL_KEPT = {"expert_intermediate_sizes": None, "qk_head_dims": None, "vo_head_dims": None}

VARIANTS = [
    pytest.param("llama", {"vo_mode": "static"}, id="one value mask for all tokens"),
    pytest.param("llama", {"vo_mode": "none"}, id="no value mask and no value router"),
    pytest.param("llama", {"tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False}, id="untied"),
    pytest.param("llama", ALL_KEPT, id="every width full: masks are skipped"),
    pytest.param("llama", {"num_experts": 12}, id="signature of two bytes"),
    pytest.param("llama", {"num_experts": 1}, id="one expert"),
    # With seed 0 the last kept and the first dropped value logit differ by 2e-6: either choice is correct.
    pytest.param(
        "qwen3", {"attention_bias": True, "num_key_value_heads": 1, "seed": 1}, id="biases before the norm, MQA"
    ),
    pytest.param("mistral", {"sliding_window": 24}, id="sliding window shorter than the prompts"),
    pytest.param("phi", {"tie_word_embeddings": True}, id="tied embeddings with an lm_head bias"),
    pytest.param(
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        id="scaled rotary frequencies",
    ),
]


@pytest.mark.parametrize(("family", "fields"), VARIANTS)
def test_variant_agrees_with_the_reference(tmp_path, prompts, family, fields):
    model = save_tiny_model(tmp_path, family, **fields)
    with start_engine(tmp_path) as engine:
        completions = engine.complete(prompts)
    for completion in completions:
        assert reference_completion(model, completion).tokens == completion.tokens
    assert max_logprob_difference(model, completions) < LOGPROB_LIMIT


def test_bfloat16_keeps_routers_and_masks_exact(tmp_path, prompts):
    """Weights and activations are bf16, routers float32: close to the float32 reference, not equal."""
    model = save_tiny_model(tmp_path, "llama")
    with start_engine(tmp_path, dtype="bfloat16") as engine:
        gate = engine.inspect(lambda model: model.model.layers[0].mlp.expert_gate)
        completions = engine.complete(prompts[:4])
    assert str(gate.router.weight.dtype) == "torch.float32"
    assert str(gate.expert_masks.dtype) == "torch.bfloat16"
    # In bf16 a token with two nearly equal router logits may change its expert, so the median is compared.
    differences = torch.cat([logprob_differences(model, completion) for completion in completions])
    assert differences.median() < 0.1
