"""Masks over head dims that a reload leaves out. With engines: tests/parity/test_reload.py."""

import pytest
import torch

from tests.helpers.tiny_models import tiny_config


@pytest.mark.parametrize("byte", [0, 255])
@pytest.mark.parametrize("name", ["query_key_dims", "value_dims"])
def test_a_discarded_mask_is_refused_until_it_is_loaded_again(name, byte):
    from tomoe_vllm.layers.attention.head_mask import ToMoEHeadMask

    gate = ToMoEHeadMask(tiny_config("llama", vo_mode="static"), 0, "self_attn.head_gate")
    parameter = gate.get_parameter(name)
    loaded = parameter.data.flip(0) if name == "value_dims" else parameter.data.clone()
    parameter.weight_loader(parameter, loaded)
    gate.finish_loading()
    gate.finish_loading()  # a reload without the masks
    parameter.data.fill_(byte)  # sleep level 2
    assert torch.equal(gate.kept_dims(name) != 0, loaded != 0)  # the weights are pruned before finish_loading
    with pytest.raises(ValueError, match=rf"self_attn\.head_gate\.{name} keeps .* include the masks in the reload"):
        gate.finish_loading()
    parameter.weight_loader(parameter, loaded)
    gate.finish_loading()
    assert torch.equal(gate.kept_dims(name), loaded)
