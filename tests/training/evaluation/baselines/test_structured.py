"""Magnitude and Wanda against a layer written out by hand."""

import pytest
import torch
from tomoe_training.config import RunConfig
from tomoe_training.data import InterleavedBlocks
from tomoe_training.evaluation.baselines.magnitude import magnitude
from tomoe_training.evaluation.baselines.setup import Contest
from tomoe_training.evaluation.baselines.structured import InputNorms, StaticHeadGate, prune, unit_scores
from tomoe_training.evaluation.baselines.wanda import input_norms

from tests.helpers.compare import assert_close
from tests.helpers.dense_models import dense_model
from tomoe_vllm.hf.configuration_tomoe import block_shape, family_of


@pytest.fixture
def layer_by_hand():
    """One layer of 4 neurons and 2 heads of 4 dims (one K/V head); Q/K units are the pairs (0, 2) and (1, 3)."""
    model = dense_model(
        "llama", hidden_size=2, intermediate_size=4, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4,
    )  # fmt: skip
    layer = model.model.layers[0]
    weights = {
        "mlp.down_proj": [[1, -5, 0, 2], [-1, 2, 4, 2]],  # column sums of |W|: 2, 7, 4, 4
        "self_attn.o_proj": [[1, 2, 0, 0, 3, 0, 0, 1], [0, 0, -1, 0, 0, 0, 1, 0]],
        "self_attn.q_proj": [[1, 0], [2, 0], [0, 3], [0, 0], [0, -1], [1, 0], [0, 0], [2, 0]],
        "self_attn.k_proj": [[2, 0], [1, 0], [1, 0], [0, 2]],
    }
    with torch.no_grad():
        for name, rows in weights.items():
            layer.get_submodule(name).weight.copy_(torch.tensor(rows, dtype=torch.float32))
    return model


def _norms(attention_in=(1, 1), attention_out=(1,) * 8, mlp_out=(1,) * 4):
    return InputNorms(
        attention_in=torch.tensor(attention_in).float(),
        attention_out=torch.tensor(attention_out).float(),
        mlp_out=torch.tensor(mlp_out).float(),
    )


def test_unit_scores_are_sums_of_weights(layer_by_hand):
    config = layer_by_hand.config
    scores = unit_scores(layer_by_hand.model.layers[0], family_of(config), block_shape(config), _norms())
    assert scores.neurons.tolist() == [2, 7, 4, 4]
    assert scores.value.tolist() == [1 + 3, 2, 1 + 1, 1]
    # Rows of q over both heads: [1 + 1, 2 + 1, 3 + 0, 0 + 2]; of k: [2, 1, 1, 2]. Products 4, 3, 3, 4.
    assert scores.query_key.tolist() == [4 + 3, 3 + 4]


def test_unit_scores_are_scaled_by_the_inputs_norms(layer_by_hand):
    config = layer_by_hand.config
    norms = _norms(attention_in=(1, 10), attention_out=(1, 1, 1, 9, 1, 1, 1, 9), mlp_out=(3, 1, 0.5, 1))
    scores = unit_scores(layer_by_hand.model.layers[0], family_of(config), block_shape(config), norms)
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
def test_pruning_keeps_the_best_scored(norms, neurons, query_key, value, layer_by_hand):
    # 6 parameters per head dim and per neuron, 72 in all. Half of the head dims use 24 of 36: 2 neurons are left.
    game = _game(layer_by_hand, active_ratio=0.5)
    gates = prune(game, [norms], attention_ratio=0.5, tokens=0)
    assert gates.experts[0].neurons.int().tolist() == neurons
    head = gates.heads[0]
    assert isinstance(head, StaticHeadGate)
    assert head.value_dims.sum() == 2
    assert (head.value_dims.int() >= torch.tensor(value)).all()
    if query_key is not None:
        assert head.query_key_dims.int().tolist() == query_key


def _game(model, **fields):
    return Contest(
        base=model, config=RunConfig(**fields), blocks=InterleavedBlocks([torch.zeros(4, 4).long()], 0), work=None
    )


def test_magnitude_needs_no_text(layer_by_hand):
    gates = magnitude(_game(layer_by_hand, active_ratio=0.5))
    assert gates.tokens == 0
    assert gates.experts[0].neurons[1]
    assert not gates.experts[0].neurons[0]


def test_wanda_norms_are_those_of_the_dense_activations(contest):
    game = contest()
    norms, tokens = input_norms(game)
    ids = torch.stack([game.blocks.block(i) for i in range(8)])
    assert tokens == ids.numel() == 256
    seen = {}
    for i, layer in enumerate(game.layers):
        layer.mlp.register_forward_pre_hook(lambda module, args, i=i: seen.__setitem__(i, args[0]))
    game.base(ids)
    first = game.layers[0].input_layernorm(game.base.model.embed_tokens(ids)).flatten(0, 1)
    assert_close(norms[0].attention_in, first.norm(dim=0))
    for i, layer in enumerate(game.layers):
        neurons = torch.nn.functional.silu(layer.mlp.gate_proj(seen[i])) * layer.mlp.up_proj(seen[i])
        assert_close(norms[i].mlp_out, neurons.flatten(0, 1).norm(dim=0))
