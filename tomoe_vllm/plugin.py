"""What vLLM calls in every one of its processes: makes the ToMoE configs and architectures known.

Registration is by name ("module:Class"), so nothing heavy is imported and no device is touched before
vLLM builds a model. vLLM does not guard this call: an exception here would stop every vLLM on the machine,
also one that serves another model. So a failure is logged in one line, and vLLM then refuses ToMoE models
(with remote code allowed, the checkpoint's own config says why: ``_require_plugin_in_vllm``).
"""

import logging

MODEL_CLASS = "tomoe_vllm.models.tomoe:ToMoEForCausalLM"

logger = logging.getLogger(__name__)


def architectures() -> list[str]:
    """Names in ``architectures`` of a ToMoE checkpoint's config.json: one per family, one class for all."""
    from tomoe_vllm.hf.configuration_tomoe import CONFIG_CLASSES

    return [config.__name__.removesuffix("Config") + "ForCausalLM" for config in CONFIG_CLASSES.values()]


def register() -> None:
    """Register configs and architectures. Idempotent; never raises."""
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
