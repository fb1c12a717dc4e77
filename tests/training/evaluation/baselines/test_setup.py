"""All methods: budgets counted over what tokens use, gates on and off."""

import pytest
import torch
from tomoe_training.evaluation.compare import METHODS


class _Used:
    """What tokens of one layer use, counted at the linears behind the gates: zeros are unused."""

    def __init__(self, layer, family, head_dim):
        self.head_dim = head_dim
        layer.get_submodule(family.query).register_forward_hook(self._see("qk", is_output=True))
        layer.get_submodule(family.key).register_forward_hook(self._see("qk_of_keys", is_output=True))
        layer.get_submodule(family.attention_out).register_forward_hook(self._see("vo"))
        layer.get_submodule(family.mlp_out).register_forward_hook(self._see("mlp"))

    def _see(self, name, is_output=False):
        def hook(module, args, output):
            used = (output if is_output else args[0]) != 0
            if name != "mlp":
                used = used.reshape(*used.shape[:2], -1, self.head_dim).any(dim=2)
            setattr(self, name, used[0])

        return hook


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("family", "p"), [("llama", 0.6), ("qwen3", 0.6), ("phi", 0.8)])
def test_no_token_uses_more_than_the_budget(name, family, p, make_setup):
    setup = make_setup(family, active_ratio=p)
    gates = METHODS[name](setup)
    gates.attach(setup.base)
    gates.set_on(True)
    used = [_Used(layer, setup.family, setup.shape.head_dim) for layer in setup.layers]
    setup.base(torch.randint(3, 90, (1, 50), generator=torch.Generator().manual_seed(1)))
    config, total, active = setup.base.config, 0, torch.zeros(50)
    for layer in used:
        assert torch.equal(layer.qk, layer.qk_of_keys)
        matrices = 2 if family == "phi" else 3
        heads = config.hidden_size * (config.num_attention_heads + config.num_key_value_heads)
        active += heads * (layer.qk.sum(-1) + layer.vo.sum(-1))
        active += matrices * config.hidden_size * layer.mlp.sum(-1)
        total += 2 * heads * setup.shape.head_dim + matrices * config.hidden_size * config.intermediate_size
    assert active.max().item() == gates.widths.active_parameters(setup.shape) <= p * total
    assert active.max().item() > (p - 0.08) * total  # and the budget is spent


@pytest.mark.parametrize("name", ["magnitude", "wanda", "cmoe", "static_mask"])
def test_gates_switched_off_leave_the_dense_model(name, make_setup):
    setup = make_setup()
    ids = torch.randint(3, 90, (1, 20))
    expected = setup.base(ids).logits
    gates = METHODS[name](setup)
    gates.attach(setup.base)
    assert torch.equal(setup.base(ids).logits, expected)
    gates.set_on(True)
    assert not torch.equal(setup.base(ids).logits, expected)
