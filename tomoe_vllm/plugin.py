"""vLLM's entry point: registers the ToMoE configs and architectures. vLLM calls it in each of its processes.

Architectures are registered by name ("module:Class"), so no model code is imported and no device is initialized before
vLLM builds a model. vLLM does not catch exceptions of plugins: one raised here would stop every vLLM process on the
machine, including those that serve other models. A failure is therefore logged in one line, and vLLM then rejects ToMoE
models (with remote code allowed, the checkpoint's own model class explains it: ``is_backend_compatible``).
"""

import logging

MODEL_CLASS = "tomoe_vllm.models.tomoe:ToMoEForCausalLM"

logger = logging.getLogger(__name__)


def architectures() -> list[str]:
    """Architecture names of ToMoE checkpoints (``architectures`` in config.json), one per family."""
    from tomoe_vllm.hf.configuration_tomoe import CONFIG_CLASSES

    return [config.__name__.removesuffix("Config") + "ForCausalLM" for config in CONFIG_CLASSES.values()]


def register() -> None:
    """Register configs and architectures. Idempotent. Logs errors instead of raising them."""
    try:
        from vllm import ModelRegistry

        from tomoe_vllm.hf.register import register_configs

        register_configs()
        for architecture in architectures():
            ModelRegistry.register_model(architecture, MODEL_CLASS)
    except Exception as error:
        logger.error(
            "ToMoE plugin not registered, ToMoE checkpoints will not load: %s: %s", type(error).__name__, error
        )
