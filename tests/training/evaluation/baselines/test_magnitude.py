"""Magnitude pruning on a layer written out by hand."""

from tomoe_training.evaluation.baselines.magnitude import magnitude, magnitude_mlp


def test_magnitude_uses_no_text_and_keeps_the_largest_columns(setup_by_hand):
    gates = magnitude(setup_by_hand)
    assert gates.tokens == 0
    assert gates.experts[0].neurons[1]
    assert not gates.experts[0].neurons[0]


def test_mlp_form_leaves_attention_dense_within_the_same_budget(make_setup):
    setup = make_setup(active_ratio=0.6)
    both, mlp = magnitude(setup), magnitude_mlp(setup)
    assert mlp.heads == []
    assert mlp.widths.qk_dims == [setup.shape.head_dim] * len(setup.layers)
    assert mlp.widths.experts[0] < both.widths.experts[0]
    assert mlp.widths.active_ratio(setup.shape) <= 0.6
