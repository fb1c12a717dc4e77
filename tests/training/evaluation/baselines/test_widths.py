"""Widths of baselines within the budget."""

import pytest
from tomoe_training.evaluation.baselines.widths import OutOfBudgetError, equal_experts, mlp_width, uniform_widths

from tomoe_vllm.hf.tomoe_math import BlockShape

SMOLLM2 = BlockShape(
    hidden_size=576, num_heads=9, num_kv_heads=3, head_dim=64, rotary_dim=64, intermediate_size=1536, num_mlp_matrices=3
)
LLAMA3 = BlockShape(
    hidden_size=4096,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rotary_dim=128,
    intermediate_size=14336,
    num_mlp_matrices=3,
)
PHI2 = BlockShape(
    hidden_size=2560, num_heads=32, num_kv_heads=32, head_dim=80, rotary_dim=32, intermediate_size=10240,
    num_mlp_matrices=2,
)  # fmt: skip


@pytest.mark.parametrize("shape", [SMOLLM2, LLAMA3, PHI2])
@pytest.mark.parametrize("p", [0.5, 0.6, 0.7, 0.9, 1.0])
def test_mlp_width_is_the_largest_within_the_budget(shape, p):
    for attention_ratio in (p, 1.0):
        widths = uniform_widths(shape, 2, p, attention_ratio)
        assert widths.active_ratio(shape) <= p
        one_more = shape.active_parameters(widths.qk_dims[0], widths.vo_dims[0], widths.experts[0] + 1)
        assert one_more > p * shape.total_parameters or widths.experts[0] == shape.intermediate_size
        assert widths.qk_dims[0] % 2 == 0


def test_mlp_width_of_a_known_model():
    # SmolLM2: attention 576 * 12 * 128 = 884,736 of 3,538,944; half of all leaves as much again for the MLP.
    assert mlp_width(SMOLLM2, 0.5, 64, 64) == 884_736 // (3 * 576) == 512


def test_attention_over_the_budget_is_an_error():
    with pytest.raises(OutOfBudgetError, match=r"attention alone uses 0\.250 of the block parameters"):
        mlp_width(SMOLLM2, 0.25, 64, 64)


@pytest.mark.parametrize(
    ("num_neurons", "width", "expected"),
    [
        (1536, 512, (12, 4)),  # 12 and 24 experts are exact: the fewer
        (1536, 921, (32, 19)),  # 912 of 921: nothing is nearer
        (1536, 1536, (8, 8)),  # all of them
        (96, 7, (16, 1)),  # 8 to 12 experts have more than 7 neurons each: 6, or twice 3 of 32
        (11008, 5504, (8, 4)),
    ],
)
def test_experts_have_the_largest_width_within_the_limit(num_neurons, width, expected):
    assert equal_experts(num_neurons, width) == expected


@pytest.mark.parametrize(("num_neurons", "width"), [(97, 50), (1536, 47)])
def test_indivisible_number_of_neurons_is_an_error(num_neurons, width):
    with pytest.raises(OutOfBudgetError, match="equal experts"):
        equal_experts(num_neurons, width)
