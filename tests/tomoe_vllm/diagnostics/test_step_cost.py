"""The cost model of whole steps, against counts from the models' configs and by hand."""

from dataclasses import replace

import pytest

from tests.helpers.tiny_models import tiny_config, tiny_model
from tomoe_vllm.diagnostics import step_cost
from tomoe_vllm.diagnostics.roofline import CHIPS
from tomoe_vllm.diagnostics.step_cost import LLAMA_2_7B_MODEL, QWEN_2_5_1_5B, ModelShape, Step, speed, step_seconds

A100, H100, H200 = CHIPS
DECODE = Step(num_tokens=1)
PREFILL = Step(num_tokens=2048, is_prefill=True)


@pytest.fixture
def no_launches(monkeypatch):
    """Peak rates, and launches that cost nothing."""
    monkeypatch.setattr(step_cost, "LAUNCH_SECONDS", 0.0)
    monkeypatch.setattr(step_cost, "BANDWIDTH_SHARE", 1.0)
    monkeypatch.setattr(step_cost, "FLOPS_SHARE", 1.0)


@pytest.mark.parametrize(
    ("model", "num_parameters", "kv_values"),
    [
        # Hugging Face's model cards; without the embedding, of which a step reads a row, but with lm_head (Qwen's is
        # the embedding itself). Norms and biases are not counted.
        (LLAMA_2_7B_MODEL, 6.738e9 - 32_000 * 4096, 2 * 32 * 128 * 32),
        (QWEN_2_5_1_5B, 1.544e9, 2 * 2 * 128 * 28),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_dense_decode_step_reads_all_weights_and_the_cache_once(no_launches, model, num_parameters, kv_values):
    num_bytes = 2 * num_parameters + 2 * step_cost.CONTEXT * kv_values
    assert step_seconds(model, DECODE, A100)["dense"] == pytest.approx(num_bytes / A100.bandwidth, rel=1e-3)


def test_a_dense_prefill_step_computes_two_flops_for_each_weight_and_token(no_launches):
    layers = 6.738e9 - 2 * 32_000 * 4096
    attention = 4 * 2048 * 1024 * 32 * 128 * 32  # scores and values of half of all pairs
    flops = 2 * 2048 * layers + attention
    last_row = 2 * 32_000 * 4096 / H100.bandwidth
    expected = flops / H100.flops + last_row
    assert step_seconds(LLAMA_2_7B_MODEL, PREFILL, H100)["dense"] == pytest.approx(expected, rel=1e-3)


def test_the_masked_layout_adds_four_launches_a_layer_and_the_bytes_of_its_gates(monkeypatch):
    without = dict(
        zip("ab", (step_seconds(LLAMA_2_7B_MODEL, DECODE, A100)[k] for k in ("dense", "masked")), strict=True)
    )
    monkeypatch.setattr(step_cost, "LAUNCH_SECONDS", step_cost.LAUNCH_SECONDS + 1e-6)
    seconds = step_seconds(LLAMA_2_7B_MODEL, DECODE, A100)
    extra = (seconds["masked"] - without["b"]) - (seconds["dense"] - without["a"])
    assert extra == pytest.approx(4 * 32 * 1e-6)
    monkeypatch.setattr(step_cost, "LAUNCH_SECONDS", 0.0)
    seconds = step_seconds(LLAMA_2_7B_MODEL, DECODE, A100)
    gates = 4 * (8 * 4096 + 128 * 4096 + 128 * 128)  # float32 weights of route and the value mask
    expected = 32 * gates / (step_cost.BANDWIDTH_SHARE * A100.bandwidth)
    assert seconds["masked"] - seconds["dense"] == pytest.approx(expected, rel=0.03)


def test_a_model_without_value_masks_pays_for_the_router_only():
    static = replace(LLAMA_2_7B_MODEL, num_value_masks=0)
    assert 0.97 < speed(static, "masked", DECODE, A100) < 1
    assert speed(static, "masked", DECODE, A100) > speed(LLAMA_2_7B_MODEL, "masked", DECODE, A100)


def test_removed_query_key_dims_save_their_share_of_the_projections(no_launches):
    half = replace(LLAMA_2_7B_MODEL, query_key_dims=64)
    saved = step_seconds(LLAMA_2_7B_MODEL, DECODE, A100)["masked"] - step_seconds(half, DECODE, A100)["masked"]
    assert saved == pytest.approx(32 * 2 * 4096 * 2 * 32 * 64 / A100.bandwidth)
    assert step_seconds(half, DECODE, A100)["dense"] == step_seconds(LLAMA_2_7B_MODEL, DECODE, A100)["dense"]


@pytest.mark.parametrize("family", ["llama", "phi", "qwen2"])
def test_shape_of_a_config_has_the_weights_of_the_model(no_launches, family):
    config = tiny_config(family, head_dim=32, hidden_size=128, vo_head_dims=[16, 7, 32], qk_head_dims=[32] * 3)
    model = tiny_model(family, head_dim=32, hidden_size=128, vo_head_dims=[16, 7, 32], qk_head_dims=[32] * 3)
    shape = ModelShape.of(config, itemsize=2)
    assert shape.num_value_masks == 2
    weights = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2 and "_gate." not in name and "embed" not in name and "lm_head" not in name
    )
    weights += config.vocab_size * config.hidden_size
    cache = step_cost.CONTEXT * 2 * shape.num_kv_heads * 32 * 3
    expected = 2 * (weights + cache) / A100.bandwidth
    assert step_seconds(shape, DECODE, A100)["dense"] == pytest.approx(expected, rel=1e-6)


def test_ranks_divide_everything_but_the_routers(no_launches):
    config = tiny_config("llama", num_key_value_heads=2)
    whole, half = (ModelShape.of(config, 2, tp_size) for tp_size in (1, 2))
    seconds = [step_seconds(shape, DECODE, A100) for shape in (whole, half)]
    assert seconds[1]["dense"] == pytest.approx(seconds[0]["dense"] / 2)
    assert seconds[1]["masked"] > seconds[0]["masked"] / 2


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_sparse_paths_gain_where_the_mlp_gains(chip):
    assert speed(LLAMA_2_7B_MODEL, "shared gather", DECODE, chip) > 1.2
    assert speed(LLAMA_2_7B_MODEL, "shared grouped", PREFILL, chip) > 1.3
    assert speed(LLAMA_2_7B_MODEL, "shared dense", DECODE, chip) == speed(LLAMA_2_7B_MODEL, "masked", DECODE, chip) < 1
    assert speed(LLAMA_2_7B_MODEL, "fused", Step(num_tokens=16), chip) < 0.6


def test_reachable_steps_of_an_engine():
    steps = [str(step) for step in Step.reachable(1, 6, 8192)]
    assert steps == ["decode 1", "decode 2", "decode 4", "prefill 8,192"]
    assert [str(step) for step in Step.reachable(4, 16, 512)] == ["decode 4", "decode 8", "decode 16", "prefill 512"]
