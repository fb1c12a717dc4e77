"""Registers the ToMoE families with transformers' Auto classes. Not shipped inside checkpoints."""

from transformers import AutoConfig, AutoModelForCausalLM

from tomoe_vllm.hf.configuration_tomoe import CONFIG_CLASSES


def register_configs() -> None:
    """Register the config classes. Idempotent."""
    for config_class in CONFIG_CLASSES.values():
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)


def register_with_transformers() -> None:
    """Register config and model classes: a checkpoint then loads without remote code. Idempotent."""
    from tomoe_vllm.hf.modeling_tomoe import MODEL_CLASSES

    register_configs()
    for name, model_class in MODEL_CLASSES.items():
        AutoModelForCausalLM.register(CONFIG_CLASSES[name], model_class, exist_ok=True)
