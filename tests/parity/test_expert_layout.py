"""Choice of the expert layout on a CPU, and equal output in all layouts."""

import pytest
import torch

from tests.helpers.tiny_models import save_tiny_model
from tests.parity.conftest import make_prompts, max_logprob_difference, start_engine
from tests.parity.test_families import LOGPROB_LIMIT
from tests.parity.test_loading import loading_error
from tomoe_vllm.kernels import build
from tomoe_vllm.kernels.expert_mlp.weight_layout import neuron_order

pytestmark = pytest.mark.engine


@pytest.fixture(autouse=True)
def compiler():
    if build.compiler() is None:
        pytest.skip("no C++ compiler")


def mlp_class(engine) -> str:
    return engine.inspect(lambda model: type(model.model.layers[0].mlp).__name__)


def neurons_are_in_order(model) -> bool:
    """Whether the neurons of each layer were permuted for the CPU kernels, weights and masks alike."""
    mlps = [layer.mlp for layer in model.model.layers]
    if any(projection.order is None for mlp in mlps for projection in getattr(mlp, "projections", ())):
        return False
    return all(
        neuron_order(mlp.expert_gate.expert_masks).tolist() == list(range(mlp.expert_gate.expert_masks.shape[1]))
        and all(
            torch.equal(mlp.expert_gate.masks()[:, projection.order], mlp.expert_gate.expert_masks != 0)
            for projection in mlp.projections
        )
        for mlp in mlps
    )


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_float32_on_a_cpu_uses_the_shared_layout_and_masked_agrees(tmp_path, prompts, family):
    model = save_tiny_model(tmp_path, family)
    with start_engine(tmp_path) as engine:
        assert mlp_class(engine) == "ToMoESharedMLP"
        assert engine.inspect(neurons_are_in_order)
        shared = engine.complete(prompts[:6])
    with start_engine(tmp_path, hf_overrides={"expert_layout": "masked"}) as engine:
        assert mlp_class(engine) == "ToMoEMaskedMLP"
        assert not engine.inspect(neurons_are_in_order)  # the order of the checkpoint
        masked = engine.complete(prompts[:6])
    assert [c.tokens for c in shared] == [c.tokens for c in masked]
    assert max_logprob_difference(model, shared) < LOGPROB_LIMIT
    assert max_logprob_difference(model, masked) < LOGPROB_LIMIT


def test_without_a_compiler_the_masked_layout_is_used(tmp_path, prompts, monkeypatch):
    monkeypatch.setattr(build, "load", lambda: False)
    model = save_tiny_model(tmp_path, "llama")
    with start_engine(tmp_path) as engine:
        assert mlp_class(engine) == "ToMoEMaskedMLP"
        assert max_logprob_difference(model, engine.complete(prompts[:4])) < LOGPROB_LIMIT


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bfloat16"}, "but its CPU kernels take float32 and the model's dtype is bfloat16"),
        ({"enable_lora": True}, "but LoRA adapters wrap vLLM's own linears; use 'auto' or 'masked'"),
    ],
)
def test_unavailable_shared_layout_is_refused(tmp_path, options, message):
    save_tiny_model(tmp_path, "llama")
    error = loading_error(tmp_path, hf_overrides={"expert_layout": "shared"}, **options)
    assert "expert_layout is 'shared', " + message in error


def test_unknown_layout_is_refused(tmp_path):
    save_tiny_model(tmp_path, "llama")
    assert "expert_layout is 'dense'; it must be one of auto, shared, masked" in loading_error(
        tmp_path, hf_overrides={"expert_layout": "dense"}
    )


def test_wrong_shape_of_an_mlp_tensor_is_refused(tmp_path):
    from tests.parity.test_loading import edit_checkpoint

    save_tiny_model(tmp_path, "llama")
    edit_checkpoint(tmp_path, add={"model.layers.0.mlp.down_proj.weight": torch.zeros(120, 96)})
    assert "a tensor of the MLP has [96, 120] (neurons first); config.json says [96, 128]" in loading_error(tmp_path)


def test_greedy_tokens_do_not_depend_on_the_batch_or_on_chunks_of_the_prompt(tmp_path):
    save_tiny_model(tmp_path, "llama")
    prompts = make_prompts(96, lengths=(1, 40, 90, 17, 64, 33, 120, 5, 80))
    with start_engine(tmp_path) as engine:
        together = [c.tokens for c in engine.complete(prompts, prompt_logprobs=None)]
        alone = [engine.complete([prompt], prompt_logprobs=None)[0].tokens for prompt in prompts]
    with start_engine(tmp_path, enable_chunked_prefill=True, max_num_batched_tokens=32) as engine:
        chunked = [c.tokens for c in engine.complete(prompts, prompt_logprobs=None)]
    assert together == alone == chunked
