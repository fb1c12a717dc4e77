"""Budgets: never above p, and close to it."""

import dataclasses

import pytest
import torch
from tomoe_training.budget import (
    NUM_QUANTILES,
    LayerLogits,
    UnitImportance,
    allocate_widths,
    choose_units,
    expert_masks,
    round_width,
    shift_to_widths,
    solve_widths,
    widths_at,
)

from tomoe_vllm.hf.tomoe_math import BlockShape

SHAPES = {
    "smollm2-135m": BlockShape(  # grouped-query attention, 9 heads
        hidden_size=576, num_heads=9, num_kv_heads=3, head_dim=64, rotary_dim=64, intermediate_size=1536,
        num_mlp_matrices=3,
    ),
    "qwen2.5-0.5b": BlockShape(  # wide MLP, two KV heads
        hidden_size=896, num_heads=14, num_kv_heads=2, head_dim=64, rotary_dim=64, intermediate_size=4864,
        num_mlp_matrices=3,
    ),
    "phi-2": BlockShape(  # partial rotary, no gate
        hidden_size=2560, num_heads=32, num_kv_heads=32, head_dim=80, rotary_dim=32, intermediate_size=10240,
        num_mlp_matrices=2,
    ),
}  # fmt: skip
NUM_LAYERS = 12


def _logits(shape, vo_mode="dynamic", num_layers=NUM_LAYERS, seed=0, num_experts=4):
    generator = torch.Generator().manual_seed(seed)

    def layer():
        spread, shift = 0.5 + torch.rand(1, generator=generator) * 3, torch.randn(1, generator=generator)
        value = None
        if vo_mode == "static":
            value = torch.randn(shape.head_dim, generator=generator) * spread
        if vo_mode == "dynamic":
            value = (torch.randn(NUM_QUANTILES, generator=generator) * spread).sort().values
        return LayerLogits(
            experts=torch.randn(num_experts, shape.intermediate_size, generator=generator) * spread + shift,
            query_key=torch.randn(shape.num_units, generator=generator) * spread + shift,
            value=value,
        )

    return [layer() for _ in range(num_layers)]


def _ratio_by_hand(widths, shape):
    """Entries of the sliced matrices over entries of the whole ones."""
    heads, kv_heads, d = shape.num_heads, shape.num_kv_heads, shape.hidden_size
    active = total = 0
    for qk, vo, mlp in zip(widths.qk_dims, widths.vo_dims, widths.experts, strict=True):
        active += d * qk * heads + d * qk * kv_heads + d * vo * kv_heads + d * vo * heads
        active += shape.num_mlp_matrices * d * mlp
        total += 2 * d * shape.head_dim * (heads + kv_heads) + shape.num_mlp_matrices * d * shape.intermediate_size
    return active / total


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("vo_mode", ["dynamic", "static", "none"])
@pytest.mark.parametrize("p", [0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
def test_active_ratio_is_at_most_p_and_within_one_percent(name, vo_mode, p):
    shape = SHAPES[name]
    widths = solve_widths(_logits(shape, vo_mode), shape, p)
    ratio = _ratio_by_hand(widths, shape)
    assert p - 0.01 <= ratio <= p
    assert widths.active_ratio(shape) == pytest.approx(ratio, abs=1e-12)
    for width in widths.experts:
        assert width % 32 == 0
        assert 32 <= width <= shape.intermediate_size
    for dims in widths.qk_dims:
        assert dims % 8 == 0
        assert 8 <= dims <= shape.head_dim
    for dims in widths.vo_dims:
        assert 1 <= dims <= shape.head_dim
        assert vo_mode == "dynamic" or dims % 8 == 0
        assert vo_mode != "none" or dims == shape.head_dim


@pytest.mark.parametrize("seed", range(5))
def test_budget_holds_for_other_logits_and_multiples(seed):
    shape = SHAPES["smollm2-135m"]
    widths = solve_widths(_logits(shape, seed=seed + 10), shape, 0.5, width_multiple=64, head_dim_multiple=16)
    assert 0.49 <= _ratio_by_hand(widths, shape) <= 0.5
    assert all(width % 64 == 0 for width in widths.experts)
    assert all(dims % 16 == 0 for dims in widths.qk_dims)


def test_layers_with_larger_logits_get_more_neurons():
    shape = SHAPES["smollm2-135m"]
    layers = _logits(shape, num_layers=2)
    base = layers[0].experts
    layers = [
        LayerLogits(experts=base + shift, query_key=layers[0].query_key, value=layers[0].value) for shift in (0, 1)
    ]
    widths = solve_widths(layers, shape, 0.5)
    assert widths.experts[1] > widths.experts[0]


def test_width_of_a_layer_is_that_of_its_widest_expert():
    shape = SHAPES["smollm2-135m"]
    layer = _logits(shape, num_layers=1, num_experts=1)[0]
    narrow = LayerLogits(
        experts=torch.cat([layer.experts, layer.experts - 2]), query_key=layer.query_key, value=layer.value
    )
    assert solve_widths([narrow], shape, 0.6).experts == solve_widths([layer], shape, 0.6).experts


def test_full_budget_keeps_everything():
    shape = SHAPES["phi-2"]
    widths = solve_widths(_logits(shape, num_layers=2), shape, 1.0)
    assert (widths.experts, widths.qk_dims, widths.vo_dims) == ([10240] * 2, [80] * 2, [80] * 2)


def test_impossible_budget_error_has_the_smallest_ratio():
    shape = SHAPES["smollm2-135m"]
    with pytest.raises(ValueError, match=r"active_ratio 0.01 is below the narrowest model of this shape, 0\.0\d+"):
        solve_widths(_logits(shape), shape, 0.01)


def test_impossible_budget_without_value_pruning():
    shape = SHAPES["phi-2"]
    with pytest.raises(ValueError, match="narrowest model"):
        solve_widths(_logits(shape, "none"), shape, 0.1)


@pytest.mark.parametrize(
    ("width", "multiple", "limit", "expected"),
    [
        (100, 32, 1536, 96),
        (113, 32, 1536, 128),
        (3, 32, 1536, 32),  # never nothing
        (0, 8, 64, 8),
        (1600, 32, 1536, 1536),
        (79, 32, 80, 80),  # a limit that is no multiple
        (70, 32, 80, 64),
        (80, 32, 80, 80),
        (10, 32, 20, 20),  # a limit below one multiple
    ],
)
def test_widths_round_to_the_nearest_multiple_inside_the_limit(width, multiple, limit, expected):
    assert round_width(width, multiple, limit) == expected


def _kept_dims(units, shape):
    pairs = shape.rotary_dim // 2
    return 2 * int(units[:pairs].sum()) + int(units[pairs:].sum())


@pytest.mark.parametrize("num_dims", [8, 16, 40, 79, 80])
def test_units_of_a_partial_rotary_head_fill_the_dims_exactly(num_dims):
    shape = SHAPES["phi-2"]
    logits = torch.randn(64, generator=torch.Generator().manual_seed(num_dims))
    assert _kept_dims(choose_units(logits, num_dims, shape), shape) == num_dims


def _greedy_units(logits, num_dims, shape):
    """The definition, one unit after the other: a unit that exceeds the remaining dims is skipped."""
    kept, left = [], num_dims
    for unit in sorted(range(shape.num_units), key=lambda u: (-logits[u].item(), u)):
        size = 2 if unit < shape.rotary_dim // 2 else 1
        if size <= left:
            kept.append(unit)
            left -= size
    return sorted(kept), left


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("num_dims", [1, 2, 7, 33, 48, 79, 80])
def test_units_are_those_of_a_greedy_choice(num_dims, seed):
    logits = torch.randn(64, generator=torch.Generator().manual_seed(seed)).round(decimals=1)  # with ties
    expected, left = _greedy_units(logits, num_dims, SHAPES["phi-2"])
    kept = choose_units(logits, num_dims, SHAPES["phi-2"]).nonzero().flatten().tolist()
    assert left or kept == expected


def test_last_single_dim_makes_room_for_a_pair():
    shape = dataclasses.replace(SHAPES["phi-2"], head_dim=8, rotary_dim=6)  # three pairs, two single dims
    logits = torch.tensor([3.0, 2.0, 1.0, 5.0, 4.0])
    assert _greedy_units(logits, 5, shape) == ([0, 3, 4], 1)
    assert choose_units(logits, 5, shape).tolist() == [True, True, False, True, False]


def test_choosing_units_reads_no_value_from_the_device():
    choose_units(torch.empty(64, device="meta"), 33, SHAPES["phi-2"])  # a value cannot be read from "meta"


def test_best_units_are_kept_first():
    shape = SHAPES["smollm2-135m"]
    logits = torch.randn(32, generator=torch.Generator().manual_seed(0))
    kept = choose_units(logits, 24, shape)
    best = sorted(range(32), key=logits.tolist().__getitem__)[-12:]
    assert kept.nonzero().flatten().tolist() == sorted(best)


def test_odd_dims_of_pairs_are_an_error():
    with pytest.raises(ValueError, match="9 Q/K dims cannot be made of RoPE pairs; use an even --head-dim-multiple"):
        choose_units(torch.randn(32), 9, SHAPES["smollm2-135m"])


def test_every_expert_mask_has_the_width():
    logits = torch.tensor([[5.0, 4.0, -9.0, -8.0, -7.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    assert expert_masks(logits, 3).tolist() == [[True, True, False, False, True], [False, False, True, True, True]]


@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2.5-0.5b"])
@pytest.mark.parametrize("vo_mode", ["dynamic", "static", "none"])
def test_shifted_logits_give_the_trained_widths_after_drift(name, vo_mode):
    shape, multiples = SHAPES[name], {"width_multiple": 32, "head_dim_multiple": 8}
    widths = solve_widths(_logits(shape, vo_mode, seed=1), shape, 0.5, **multiples)
    drifted = _logits(shape, vo_mode, seed=2)  # other levels and spreads in every layer
    anchored = [shift_to_widths(layer, shape, widths, i) for i, layer in enumerate(drifted)]
    again = widths_at(anchored, shape, 0.0, **multiples)
    assert (again.experts, again.qk_dims, again.vo_dims) == (widths.experts, widths.qk_dims, widths.vo_dims)
    for i, (before, after) in enumerate(zip(drifted, anchored, strict=True)):
        masks = [expert_masks(layer.experts, widths.experts[i]) for layer in (before, after)]
        assert torch.equal(*masks)


def _worth(shape, num_layers=NUM_LAYERS, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def best_first(size):
        return torch.rand(size, generator=generator).pow(3).sort(descending=True).values

    return [
        UnitImportance(
            neurons=best_first(shape.intermediate_size),
            query_key=torch.rand(shape.num_units, generator=generator),
            value=best_first(shape.head_dim),
        )
        for _ in range(num_layers)
    ]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("active_ratio", [0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("vo_mode", ["dynamic", "static"])
def test_allocated_widths_use_the_budget_and_do_not_exceed_it(name, active_ratio, vo_mode):
    shape = SHAPES[name]
    widths = allocate_widths(_worth(shape), shape, active_ratio, vo_mode=vo_mode)
    assert active_ratio - 0.01 < _ratio_by_hand(widths, shape) <= active_ratio
    assert all(width % 32 == 0 or width == shape.intermediate_size for width in widths.experts)
    assert all(dims % 2 == 0 for dims in widths.qk_dims)


def test_allocation_maximizes_importance_per_parameter():
    shape = SHAPES["smollm2-135m"]
    poor, rich = _worth(shape, num_layers=2)
    rich = UnitImportance(neurons=10 * poor.neurons, query_key=poor.query_key, value=poor.value)
    widths = allocate_widths([poor, rich], shape, 0.5)
    assert widths.experts[1] > widths.experts[0]
    # A pair costs 13,824 parameters here and a neuron 1,728: at equal worth neurons are bought.
    even = UnitImportance(neurons=torch.ones(1536), query_key=torch.ones(32), value=torch.zeros(64))
    widths = allocate_widths([even], shape, 0.768)
    assert (widths.experts, widths.qk_dims, widths.vo_dims) == ([1536], [8], [1])


def test_allocation_below_the_narrowest_model_is_refused():
    shape = SHAPES["smollm2-135m"]
    with pytest.raises(ValueError, match=r"active_ratio 0.01 is below the narrowest model of this shape, 0\.0\d+"):
        allocate_widths(_worth(shape), shape, 0.01)


def test_allocation_without_value_pruning_counts_all_value_dims():
    shape = SHAPES["phi-2"]
    assert allocate_widths(_worth(shape), shape, 0.5, vo_mode="none").vo_dims == [80] * NUM_LAYERS
