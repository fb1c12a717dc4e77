"""transformers' Auto classes know the ToMoE families after registration."""

import pytest
from transformers import AutoModelForCausalLM

from tests.helpers.tiny_models import FAMILY_FIELDS, tiny_config
from tomoe_vllm.hf.modeling_tomoe import MODEL_CLASSES
from tomoe_vllm.hf.register import register_with_transformers


@pytest.mark.parametrize("family", FAMILY_FIELDS)
def test_auto_class_builds_the_family_and_registering_twice_is_harmless(family):
    register_with_transformers()
    register_with_transformers()
    assert type(AutoModelForCausalLM.from_config(tiny_config(family))) is MODEL_CLASSES[family]
