"""The fused layout: vLLM's fused MoE over experts that are sliced while loading."""

import pytest
import torch

from tests.helpers.tiny_models import save_tiny_model
from tests.parity.conftest import max_logprob_difference, reference_completion, start_engine
from tests.parity.test_families import LOGPROB_LIMIT
from tests.parity.test_loading import loading_error

pytestmark = pytest.mark.engine

FUSED = {"hf_overrides": {"expert_layout": "fused"}}


def experts(model) -> list[dict]:
    """For each layer: class of its MLP, remaining elements of the checkpoint's rows, elements of the experts."""
    mlps = [layer.mlp for layer in model.model.layers]
    return [
        {
            "type": type(mlp).__name__,
            "rows": mlp.gate_up_proj.weight.numel() + mlp.down_proj.weight.numel(),
            "experts": mlp.experts.routed_experts.w13_weight.numel(),
        }
        for mlp in mlps
    ]


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        pytest.param("llama", {}, id="biases, ragged widths, 48 padded to 64"),
        pytest.param("mistral", {"expert_intermediate_sizes": [1, 96, 95]}, id="one neuron, all of them, odd"),
        pytest.param("qwen3", {"num_experts": 12}, id="signature of two bytes"),
        pytest.param("qwen2", {"num_experts": 1}, id="one expert"),
    ],
)
def test_fused_layout_agrees_with_the_reference(tmp_path, prompts, family, fields):
    model = save_tiny_model(tmp_path, family, **fields)
    with start_engine(tmp_path, **FUSED) as engine:
        layers = engine.inspect(experts)
        completions = engine.complete(prompts)
    for width, layer in zip(model.config.expert_intermediate_sizes, layers, strict=True):
        padded = -(-width // 32) * 32
        numbers = model.config.num_experts * 2 * padded * model.config.hidden_size
        assert layer == {"type": "ToMoEFusedMLP", "rows": 0, "experts": numbers}
    for completion in completions:
        assert reference_completion(model, completion).tokens == completion.tokens
    assert max_logprob_difference(model, completions) < LOGPROB_LIMIT


def test_bfloat16_is_close_to_float32(tmp_path, prompts):
    """Only close to float32: in bf16 a token with two nearly equal router logits may change its expert."""
    model = save_tiny_model(tmp_path, "llama")
    with start_engine(tmp_path, dtype="bfloat16", **FUSED) as engine:
        completions = engine.complete(prompts[:4])
    from tests.parity.conftest import logprob_differences

    assert torch.cat([logprob_differences(model, completion) for completion in completions]).median() < 0.1


@pytest.mark.slow
def test_two_ranks_split_every_expert(tmp_path, prompts):
    model = save_tiny_model(tmp_path, "llama", expert_intermediate_sizes=[31, 64, 48])
    with start_engine(tmp_path, tensor_parallel_size=2, **FUSED) as engine:
        completions = engine.complete(prompts)
    for completion in completions:
        assert reference_completion(model, completion).tokens == completion.tokens
    assert max_logprob_difference(model, completions) < LOGPROB_LIMIT


@pytest.mark.parametrize(
    ("family", "fields", "options", "message"),
    [
        ("phi", {}, {}, "vLLM's fused MoE needs an MLP with a gate"),
        ("llama", {"hidden_act": "gelu"}, {}, "only silu was tested in vLLM's fused MoE and hidden_act is 'gelu'"),
        ("llama", {"hidden_size": 144}, {}, "vLLM's CPU kernel needs a hidden_size divisible by 32; it is 144"),
        ("llama", {}, {"enable_lora": True}, "LoRA adapters wrap vLLM's own linears"),
    ],
)
def test_unavailable_fused_layout_is_refused(tmp_path, family, fields, options, message):
    save_tiny_model(tmp_path, family, **fields)
    error = loading_error(tmp_path, **FUSED, **options)
    assert f"expert_layout is 'fused', but {message}; use 'auto' or 'masked'" in error


def test_fused_layout_with_dummy_weights(tmp_path):
    save_tiny_model(tmp_path, "llama")
    with start_engine(tmp_path, load_format="dummy", **FUSED) as engine:
        (completion,) = engine.complete([[5, 6, 7]], num_tokens=2)
    assert completion.logprobs.isfinite().all()


def test_missing_tensor_is_named(tmp_path):
    from tests.parity.test_loading import edit_checkpoint

    save_tiny_model(tmp_path, "llama")
    edit_checkpoint(tmp_path, remove=["model.layers.1.mlp.up_proj.weight"])
    assert "lacks 1 tensor (model.layers.1.mlp.up_proj.weight)" in loading_error(tmp_path, **FUSED)
