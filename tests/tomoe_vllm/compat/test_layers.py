"""Replacing what runs a layer of vLLM."""

import pytest
from torch import nn

from tomoe_vllm.compat.layers import UnquantizedFusedMoEMethod, UnquantizedLinearMethod, replace_quant_method


class OwnMethod(UnquantizedLinearMethod):
    pass


def test_unquantized_method_is_replaced():
    layer = nn.Module()
    layer.quant_method = UnquantizedLinearMethod()
    method = OwnMethod()
    replace_quant_method(layer, method)
    assert layer.quant_method is method


@pytest.mark.parametrize("present", [None, UnquantizedFusedMoEMethod])
def test_other_methods_are_left_alone(present):
    layer = nn.Module()
    if present is not None:
        layer.quant_method = present.__new__(present)
    with pytest.raises(TypeError, match="OwnMethod is not"):
        replace_quant_method(layer, OwnMethod())
