"""Unit scores and structured pruning against a layer written out by hand."""

import pytest
import torch
from tomoe_training.evaluation.baselines.structured import InputNorms, StaticHeadGate, prune, unit_scores

from tomoe_vllm.hf.configuration_tomoe import block_shape, family_of


def _norms(attention_in=(1, 1), attention_out=(1,) * 8, mlp_out=(1,) * 4):
    return InputNorms(
        attention_in=torch.tensor(attention_in).float(),
        attention_out=torch.tensor(attention_out).float(),
        mlp_out=torch.tensor(mlp_out).float(),
    )


def test_unit_scores_are_sums_of_weights(model_by_hand):
    config = model_by_hand.config
    scores = unit_scores(model_by_hand.model.layers[0], family_of(config), block_shape(config), _norms())
    assert scores.neurons.tolist() == [2, 7, 4, 4]
    assert scores.value.tolist() == [1 + 3, 2, 1 + 1, 1]
    # Rows of q over both heads: [1 + 1, 2 + 1, 3 + 0, 0 + 2]; of k: [2, 1, 1, 2]. Products 4, 3, 3, 4.
    assert scores.query_key.tolist() == [4 + 3, 3 + 4]


def test_unit_scores_are_scaled_by_the_input_norms(model_by_hand):
    config = model_by_hand.config
    norms = _norms(attention_in=(1, 10), attention_out=(1, 1, 1, 9, 1, 1, 1, 9), mlp_out=(3, 1, 0.5, 1))
    scores = unit_scores(model_by_hand.model.layers[0], family_of(config), block_shape(config), norms)
    assert scores.neurons.tolist() == [6, 7, 2, 4]
    assert scores.value.tolist() == [4, 2, 2, 9]
    # q: [1 + 10, 2 + 1, 30 + 0, 0 + 2]; k: [2, 1, 1, 20]. Products 22, 3, 30, 40.
    assert scores.query_key.tolist() == [22 + 30, 3 + 40]


@pytest.mark.parametrize(
    ("norms", "neurons", "query_key", "value"),
    [
        (_norms(mlp_out=(1, 1, 1.1, 1)), [0, 1, 1, 0], None, [1, 0, 0, 0]),
        (
            _norms(attention_in=(1, 10), attention_out=(1, 1, 1, 9, 1, 1, 1, 9), mlp_out=(3, 1, 0.5, 1)),
            [1, 1, 0, 0],
            [1, 0, 1, 0],
            [0, 0, 0, 1],
        ),
    ],
)
def test_pruning_keeps_the_units_with_the_best_scores(norms, neurons, query_key, value, setup_by_hand):
    # 6 parameters per head dim and per neuron, 72 in all. Half of the head dims use 24 of 36: 2 neurons are left.
    gates = prune(setup_by_hand, [norms], attention_ratio=0.5, tokens=0)
    assert gates.experts[0].neurons.int().tolist() == neurons
    head = gates.heads[0]
    assert isinstance(head, StaticHeadGate)
    assert head.value_dims.sum() == 2
    assert (head.value_dims.int() >= torch.tensor(value)).all()
    if query_key is not None:
        assert head.query_key_dims.int().tolist() == query_key
