"""The equations against written-out loops and numbers from the paper."""

import math

import pytest
import torch

from tests.helpers.compare import assert_close, is_close
from tomoe_vllm.hf.tomoe_math import (
    GUMBEL_MEDIAN,
    BlockShape,
    head_units,
    keep_margin,
    mask_heads,
    pack_signature,
    route,
    top_mask,
    unpack_signature,
    value_logits,
)

LLAMA_2_7B = BlockShape(
    hidden_size=4096,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    rotary_dim=128,
    intermediate_size=11008,
    num_mlp_matrices=3,
)
LLAMA_3_8B = BlockShape(
    hidden_size=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rotary_dim=128,
    intermediate_size=14336,
    num_mlp_matrices=3,
)
PHI_2 = BlockShape(
    hidden_size=2560,
    num_heads=32,
    num_kv_heads=32,
    head_dim=80,
    rotary_dim=32,
    intermediate_size=10240,
    num_mlp_matrices=2,
)


def test_gumbel_median_splits_samples_in_half():
    uniform = torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    share_below = (-(-uniform.log()).log() < GUMBEL_MEDIAN).double().mean().item()
    assert share_below == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(200_000))


@pytest.mark.parametrize(("logit", "is_kept"), [(0.0, True), (-3.36, True), (-3.37, False), (-10.0, False)])
def test_margin_changes_sign_at_minus_3_3665(logit, is_kept):
    assert (keep_margin(torch.tensor(logit)).item() > 0) == is_kept


@pytest.mark.parametrize("width", [1, 5, 12])
def test_top_mask_keeps_exactly_the_largest(width):
    logits = torch.randn(3, 4, 12, generator=torch.Generator().manual_seed(1))
    mask = top_mask(logits, width)
    for row, kept in zip(logits.reshape(-1, 12).tolist(), mask.reshape(-1, 12).tolist(), strict=True):
        largest = sorted(range(12), key=row.__getitem__)[-width:]
        assert [i for i, is_kept in enumerate(kept) if is_kept] == sorted(largest)


def test_top_mask_counts_exactly_with_ties():
    assert top_mask(torch.zeros(2, 9), 4).sum(-1).tolist() == [4, 4]


def test_route_takes_the_argmax_of_each_token():
    logits = torch.tensor([[0.1, 0.3, 0.2], [-1.0, -3.0, -2.0], [0.0, 0.0, 5.0]])
    assert route(logits).tolist() == [1, 0, 2]
    assert route(logits[:1]).tolist() == [1]


# One byte not full, one full, two and three bytes, a ragged second byte; a neuron count that is no multiple of 8.
@pytest.mark.parametrize(("num_experts", "num_neurons"), [(1, 7), (5, 3), (8, 32), (13, 10), (16, 1), (24, 33)])
def test_signature_bits_say_which_experts_keep_a_neuron(num_experts, num_neurons):
    masks = torch.rand(num_experts, num_neurons, generator=torch.Generator().manual_seed(2)) < 0.4
    signature = pack_signature(masks)
    assert signature.shape == (num_neurons, math.ceil(num_experts / 8))
    assert signature.dtype == torch.uint8
    for neuron in range(num_neurons):
        bits = int.from_bytes(bytes(signature[neuron].tolist()), "little")
        assert bits == sum(1 << i for i in range(num_experts) if masks[i, neuron])
    assert torch.equal(unpack_signature(signature, num_experts), masks)


def test_signature_of_eight_experts_is_one_byte_per_neuron():
    masks = torch.zeros(8, 3, dtype=torch.bool)
    masks[0, 0] = masks[7, 1] = True
    assert pack_signature(masks).tolist() == [[1], [128], [0]]


def test_units_of_a_full_rotary_head_are_pairs_half_a_head_apart():
    assert head_units(8, 8).tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


def test_units_of_phi_2_are_16_pairs_and_48_singles():
    units = head_units(80, 32).tolist()
    assert len(units) == 80
    for i in range(16):
        assert [dim for dim in range(80) if units[dim] == i] == [i, i + 16]
    singles = units[32:]
    assert singles == list(range(16, 64))
    assert len(set(units)) == PHI_2.num_units == 64


def _value_logits_by_loop(hidden, down, bias, norm_weight, norm_bias, up, epsilon=1e-5):
    """Eq. 5 in Python floats: Proj_D(GELU(LayerNorm(Proj_E(x) + e)))."""
    rows = []
    for x in hidden.tolist():
        z = [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in zip(down.tolist(), bias, strict=True)]
        mean = sum(z) / len(z)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in z) / len(z) + epsilon)
        z = [(v - mean) / deviation * w + b for v, w, b in zip(z, norm_weight, norm_bias, strict=True)]
        z = [0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in z]
        rows.append([sum(w * v for w, v in zip(row, z, strict=True)) for row in up.tolist()])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.fixture
def value_router():
    generator = torch.Generator().manual_seed(3)
    shapes = [(5, 12), (6, 12), (6,), (6,), (6,), (10, 6)]  # [T, D], [R, D], [R], [R], [R], [A, R]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def test_value_logits_follow_eq_5(value_router):
    hidden, down, bias, norm_weight, norm_bias, up = value_router
    expected = _value_logits_by_loop(hidden, down, bias.tolist(), norm_weight.tolist(), norm_bias.tolist(), up)
    assert_close(value_logits(*value_router), expected)


def test_value_logits_are_float32_for_bfloat16_hidden_states(value_router):
    hidden = value_router[0].bfloat16()
    expected = value_logits(hidden.float(), *value_router[1:])
    actual = value_logits(hidden, *value_router[1:])
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


def test_tolerance_catches_a_tanh_gelu_or_a_lost_bias(value_router):
    hidden, down, bias, norm_weight, norm_bias, up = value_router
    exact = value_logits(*value_router)
    normed = torch.nn.functional.layer_norm(hidden @ down.T + bias, (6,), norm_weight, norm_bias)
    tanh = torch.nn.functional.gelu(normed, approximate="tanh") @ up.T
    assert not is_close(tanh, exact)
    biased = bias.clone()
    biased[0] += 1e-3
    assert not is_close(value_logits(hidden, down, biased, norm_weight, norm_bias, up), exact)


# Grouped-query attention (Q and K differ in heads), one KV head, one token.
@pytest.mark.parametrize(("num_heads", "num_tokens"), [(4, 3), (2, 3), (1, 3), (4, 1)])
@pytest.mark.parametrize("is_per_token", [False, True])
@pytest.mark.parametrize("is_split", [False, True])
def test_every_head_gets_the_same_mask(num_heads, num_tokens, is_per_token, is_split):
    head_dim, generator = 6, torch.Generator().manual_seed(4)
    heads = torch.randn(2, num_tokens, num_heads, head_dim, generator=generator)
    mask_shape = (2, num_tokens, head_dim) if is_per_token else (head_dim,)
    mask = (torch.rand(mask_shape, generator=generator) < 0.5).float()
    expected = heads.clone()
    for b in range(2):
        for t in range(num_tokens):
            for h in range(num_heads):
                for a in range(head_dim):
                    if not (mask[b, t, a] if is_per_token else mask[a]):
                        expected[b, t, h, a] = 0
    if is_split:
        assert torch.equal(mask_heads(heads, mask), expected)
    else:
        assert torch.equal(mask_heads(heads.flatten(-2), mask), expected.flatten(-2))


def test_block_parameters_of_llama_2_7b():
    # 4 attention matrices of 4096 x 4096 and 3 of 4096 x 11008, 32 layers: 6.476 B.
    assert 32 * LLAMA_2_7B.total_parameters == 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008) == 6_476_005_376


def test_block_parameters_with_grouped_query_attention():
    # LLaMA-3-8B: q and o are 4096 x 4096, k and v 1024 x 4096.
    expected = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    assert LLAMA_3_8B.total_parameters == expected == 218_103_808


def test_block_parameters_of_phi_2_have_two_mlp_matrices():
    assert PHI_2.total_parameters == 4 * 2560 * 2560 + 2 * 2560 * 10240 == 78_643_200


def test_active_parameters_count_what_is_left_after_slicing():
    shape = BlockShape(
        hidden_size=10, num_heads=4, num_kv_heads=2, head_dim=6, rotary_dim=6, intermediate_size=20, num_mlp_matrices=3
    )
    weights = {
        "q": torch.ones(4, 6, 10)[:, :4],
        "k": torch.ones(2, 6, 10)[:, :4],
        "v": torch.ones(2, 6, 10)[:, :3],
        "o": torch.ones(10, 4, 6)[:, :, :3],
        "mlp": torch.ones(3, 20, 10)[:, :7],
    }
    assert shape.active_parameters(4, 3, 7) == sum(w.numel() for w in weights.values())
    assert shape.num_units == 3


def test_extra_parameters_of_llama_2_7b_are_those_of_appendix_a1():
    # L d 128 + L 128 (d / H) + L d N = 0.0184 B, 0.27 % of the model.
    extra = 32 * LLAMA_2_7B.router_parameters(num_experts=8, router_dim=128)
    assert extra == 32 * 4096 * 128 + 32 * 128 * 128 + 32 * 4096 * 8 == 18_350_080
    assert round(extra / 1e9, 4) == 0.0184
    assert round(100 * extra / 6.738e9, 2) == 0.27


@pytest.mark.parametrize("vo_mode", ["static", "none"])
def test_only_the_expert_router_is_extra_without_value_routing(vo_mode):
    assert PHI_2.router_parameters(8, 128, vo_mode) == 2560 * 8
