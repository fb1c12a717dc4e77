"""One learned mask for all tokens."""

import torch
from tomoe_training.evaluation.baselines.static_mask import static_settings
from tomoe_training.evaluation.compare import METHODS


def test_static_mask_is_one_expert_for_all_tokens(make_setup):
    setup = make_setup()
    settings = static_settings(setup.config)
    assert (settings.num_experts, settings.vo_mode) == (1, "static")
    assert (settings.steps, settings.active_ratio) == (setup.config.steps, setup.config.active_ratio)
    gates = METHODS["static_mask"](setup)
    hidden = torch.randn(1, 9, 64)
    for head, expert in zip(gates.heads, gates.experts, strict=True):
        assert head.value_mask(hidden).dim() == 1
        masks = expert.neuron_mask(hidden)[0]
        assert (masks == masks[0]).all()
