"""Reloading weights into a running engine: the same checkpoint, and another one."""

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.tiny_models import save_tiny_model, tiny_model
from tests.parity.conftest import Engine, make_prompts, max_logprob_difference, start_engine
from tests.parity.test_families import LOGPROB_LIMIT
from tests.parity.test_loading import edit_checkpoint, loading_error
from tomoe_vllm.models.loading import MASKS

pytestmark = pytest.mark.engine
PROMPTS = make_prompts(96, lengths=(1, 17, 40, 5))
MASKED = {"hf_overrides": {"expert_layout": "masked"}}


def reload(engine: Engine, folder=None, **arguments) -> None:
    engine.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)} if folder else arguments)


def tokens(engine: Engine) -> list[list[int]]:
    return [completion.tokens for completion in engine.complete(PROMPTS, prompt_logprobs=None)]


@pytest.mark.parametrize(
    ("family", "fields", "options"),
    [
        pytest.param("llama", {}, {}, id="shared, dynamic, biases, tied"),
        pytest.param("phi", {"vo_mode": "static"}, {}, id="shared, static, partial rotary, no gate"),
        pytest.param("llama", {"vo_mode": "static"}, MASKED, id="masked, static"),
        pytest.param("qwen3", {}, MASKED, id="masked, dynamic, whole heads"),
    ],
)
def test_reloaded_engine_agrees_with_the_checkpoint(tmp_path, family, fields, options):
    first = save_tiny_model(tmp_path / "a", family, **fields)
    second = save_tiny_model(tmp_path / "b", family, seed=1, **fields)
    with start_engine(tmp_path / "a", **options) as engine:
        before = tokens(engine)
        reload(engine)
        assert tokens(engine) == before
        reload(engine, tmp_path / "b")
        assert max_logprob_difference(second, engine.complete(PROMPTS)) < LOGPROB_LIMIT
        assert tokens(engine) != before
        reload(engine, tmp_path / "a")
        assert max_logprob_difference(first, engine.complete(PROMPTS)) < LOGPROB_LIMIT
        assert tokens(engine) == before


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_failed_and_partial_reloads(tmp_path):
    save_tiny_model(tmp_path / "a", "llama")
    second = save_tiny_model(tmp_path / "b", "llama", seed=1)
    name = "model.layers.1.self_attn.v_proj.bias"
    save_tiny_model(tmp_path / "incomplete", "llama", seed=1)
    edit_checkpoint(tmp_path / "incomplete", remove=[name])
    save_tiny_model(tmp_path / "other widths", "llama", seed=1, qk_head_dims=[16, 32, 26])
    with start_engine(tmp_path / "a") as engine:
        before = tokens(engine)

        def one_by_one(model) -> None:  # as vLLM's weight transfer does
            from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

            initialize_layerwise_reload(model)
            for item in reversed(weights(tmp_path / "b").items()):
                model.load_weights([item])
            finalize_layerwise_reload(model, engine.llm.llm_engine.model_config)

        def lose_memory(model) -> None:  # as sleep level 2 does; it keeps the buffers
            for layer in model.modules():
                method = getattr(layer, "quant_method", None)
                bias = getattr(method, "bias", None)
                for tensor in (*layer._parameters.values(), bias):
                    if tensor is not None:
                        tensor.data.fill_(float("nan") if tensor.is_floating_point() else 255)

        fine_tuned = {k: v for k, v in weights(tmp_path / "b").items() if not k.endswith(MASKS)}
        engine.inspect(lose_memory)
        with pytest.raises(ValueError, match="include the masks in the reload"):
            reload(engine, weights_iterator=iter(fine_tuned.items()))
        with pytest.raises(RuntimeError, match="include the masks in the reload"):
            engine.inspect(lambda model: model.compute_logits(torch.zeros(1, 128)))
        reload(engine, tmp_path / "a")
        assert tokens(engine) == before
        engine.inspect(one_by_one)
        assert max_logprob_difference(second, engine.complete(PROMPTS)) < LOGPROB_LIMIT

        for folder, message in (("incomplete", f"lacks 1 tensor .{name}."), ("other widths", "keeps 26 dims; config")):
            with pytest.raises(ValueError, match=message):
                reload(engine, tmp_path / folder)
            with pytest.raises(RuntimeError, match=r"reloading the weights failed .* Reload all weights, or restart"):
                engine.inspect(lambda model: model.compute_logits(torch.zeros(1, 128)))
        reload(engine, tmp_path / "a")
        assert tokens(engine) == before

        reload(engine, weights_iterator=iter(fine_tuned.items()))
        expected = tiny_model("llama")
        expected.load_state_dict(fine_tuned, strict=False)
        assert max_logprob_difference(expected, engine.complete(PROMPTS)) < LOGPROB_LIMIT


def test_loaded_weights_are_protected(tmp_path):
    save_tiny_model(tmp_path, "llama")
    with start_engine(tmp_path) as engine:
        before = tokens(engine)

        def update_nothing(model) -> None:  # the neurons are in their order already
            from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

            initialize_layerwise_reload(model)
            finalize_layerwise_reload(model, engine.llm.llm_engine.model_config)

        engine.inspect(update_nothing)
        assert tokens(engine) == before
        with pytest.raises(ValueError, match=r"already loaded, .* Use reload_weights"):
            engine.inspect(lambda model: model.load_weights(weights(tmp_path).items()))
        with pytest.raises(ValueError, match=r"sharded state .* Copy the exported checkpoint instead"):
            engine.llm.collective_rpc("save_sharded_state", args=(str(tmp_path / "state"),))
        assert tokens(engine) == before


def test_fused_layout_refuses_and_stays_usable(tmp_path):
    save_tiny_model(tmp_path / "a", "qwen2")
    save_tiny_model(tmp_path / "b", "qwen2", seed=1)
    with start_engine(tmp_path / "a", hf_overrides={"expert_layout": "fused"}) as engine:
        before = tokens(engine)
        with pytest.raises(ValueError, match=r"fused layout cannot reload weights.* The weights are unchanged"):
            reload(engine, tmp_path / "b")
        assert tokens(engine) == before


def test_engine_on_dummy_weights_takes_a_checkpoint(tmp_path):
    model = save_tiny_model(tmp_path, "phi", vo_mode="static")
    with start_engine(tmp_path, load_format="dummy") as engine:
        tokens(engine)
        reload(engine, weights_iterator=iter(weights(tmp_path).items()))
        assert max_logprob_difference(model, engine.complete(PROMPTS)) < LOGPROB_LIMIT


def test_sharded_state_is_refused(tmp_path):
    save_tiny_model(tmp_path, "llama")
    assert "--load-format sharded_state restores" in loading_error(tmp_path, load_format="sharded_state")
