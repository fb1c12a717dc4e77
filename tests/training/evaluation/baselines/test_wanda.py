"""Wanda's input norms against activations computed by hand."""

import torch
from tomoe_training.evaluation.baselines.magnitude import magnitude
from tomoe_training.evaluation.baselines.wanda import input_norms, wanda, wanda_mlp

from tests.helpers.compare import assert_close


def test_norms_are_those_of_the_dense_activations(make_setup):
    setup = make_setup()
    norms, tokens = input_norms(setup)
    ids = torch.stack([setup.blocks.block(i) for i in range(8)])
    assert tokens == ids.numel() == 256
    seen = {}
    for i, layer in enumerate(setup.layers):
        layer.mlp.register_forward_pre_hook(lambda module, args, i=i: seen.__setitem__(i, args[0]))
    setup.base(ids)
    first = setup.layers[0].input_layernorm(setup.base.model.embed_tokens(ids)).flatten(0, 1)
    assert_close(norms[0].attention_in, first.norm(dim=0))
    for i, layer in enumerate(setup.layers):
        neurons = torch.nn.functional.silu(layer.mlp.gate_proj(seen[i])) * layer.mlp.up_proj(seen[i])
        assert_close(norms[i].mlp_out, neurons.flatten(0, 1).norm(dim=0))


def test_norms_decide_what_is_kept(make_setup):
    setup = make_setup(active_ratio=0.6)
    gates, by_weights = wanda(setup), magnitude(setup)
    assert gates.widths == by_weights.widths
    assert gates.tokens == 256
    pairs = zip(gates.experts, by_weights.experts, strict=True)
    assert any(not torch.equal(mine.neurons, theirs.neurons) for mine, theirs in pairs)


def test_mlp_form_leaves_attention_dense(make_setup):
    assert wanda_mlp(make_setup(active_ratio=0.6)).heads == []
