"""Checks of a model folder before anything is loaded: supported, not quantized, complete.

Names and shapes are compared with a model on the meta device, which takes less than a second. transformers fills what a
checkpoint lacks with random numbers, so an incomplete model would be trained and scored without an error.
"""

import logging
import re
from pathlib import Path
from types import SimpleNamespace

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from tomoe_training.artifacts.safetensors_io import StoredTensor, read_bytes, read_config, stored_tensors
from tomoe_vllm.hf.configuration_tomoe import FAMILIES, base_model_type
from tomoe_vllm.hf.register import register_with_transformers

PREFIX = "model."
"""Of the decoder's tensors. transformers adds and removes it, so that a bare decoder's checkpoint loads."""
HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
FLOATS = {"F64", "F32", "F16", "BF16"}
OBSOLETE = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|\.masked_bias$|\.attention\.bias$")
"""Tensors that old checkpoints store and newer programs compute."""
QUANTIZATION_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Files of AutoGPTQ, AutoAWQ and ModelOpt, beside a config.json that may not mention quantization."""
INVALID_CONFIG = (
    ArithmeticError, AttributeError, KeyError, RuntimeError, StrictDataclassError, TypeError, ValueError
)  # fmt: skip
"""Errors of transformers for a config.json with impossible or mistyped fields."""

logger = logging.getLogger(__name__)


def load_base_config(base: Path) -> PreTrainedConfig:
    """Config of a dense model folder. ``tie_word_embeddings`` is False where another ``lm_head.weight`` is stored.

    Raises ``ValueError`` for an unsupported family, a quantized model, a ToMoE checkpoint and a PEFT adapter.
    """
    raw = read_config(base)
    model_type = str(raw.get("model_type", ""))
    if model_type.startswith("tomoe_"):
        raise ValueError(f"{base} is already a ToMoE checkpoint; give the dense model as --base")
    check_not_quantized(base)
    # Before AutoConfig, whose error for an unknown type does not name the supported families.
    base_model_type(SimpleNamespace(model_type=model_type))
    config = _read_config(base)
    base_model_type(config)
    if (base / "adapter_config.json").is_file():
        raise ValueError(
            f"{base} holds a PEFT adapter (adapter_config.json), which transformers would add to the model; merge it, "
            "or move it out of the folder"
        )
    if config.tie_word_embeddings and _has_another_head(stored_tensors(base)):
        config.tie_word_embeddings = False  # as transformers does
    return config


def _read_config(folder: Path) -> PreTrainedConfig:
    register_with_transformers()
    try:
        return AutoConfig.from_pretrained(folder)
    except INVALID_CONFIG as error:
        raise ValueError(f"{folder / 'config.json'} is not valid: {error or type(error).__name__}") from error


def _has_another_head(tensors: dict[str, StoredTensor]) -> bool:
    head, embeddings = tensors.get(HEAD), tensors.get(EMBEDDINGS)
    if head is None or embeddings is None:
        return False
    if (head.dtype, head.shape) != (embeddings.dtype, embeddings.shape):
        return True
    return any(a != b for a, b in zip(read_bytes(head), read_bytes(embeddings), strict=True))


def check_not_quantized(folder: Path) -> None:
    """Raise ``ValueError`` for a quantized model (GPTQ, AWQ, bitsandbytes, FP8, compressed-tensors, ...)."""
    config = read_config(folder)
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            fields = config[key] if isinstance(config[key], dict) else {}
            _refuse_quantized(folder, str(fields.get("quant_method") or fields.get("format") or key))
    for name in QUANTIZATION_FILES:
        if (folder / name).is_file():
            _refuse_quantized(folder, name)


def _refuse_quantized(folder: Path, method: str) -> None:
    raise ValueError(
        f"{folder} is quantized ({method}); give the model that it was made from, in bfloat16, float16 or float32"
    )


def model_tensors(folder: Path, config: PreTrainedConfig, *, warns: bool = False) -> dict[str, StoredTensor]:
    """The stored tensors of a dense model or ToMoE checkpoint by the name that they have in the model.

    Names differ where a checkpoint holds a bare decoder (without ``model.``). Stored tensors that do not belong to the
    model are left out; with ``warns`` a warning names one of them. Raises ``ValueError`` unless every tensor of the
    model is stored, in its shape and in a float dtype (masks of ToMoE: as exported).
    """
    stored = stored_tensors(folder)
    expected = expected_shapes(config)
    found, unused = _match(stored, expected, folder)
    missing = [name for name in expected if name not in found and not (config.tie_word_embeddings and name == HEAD)]
    if missing == [EMBEDDINGS] and config.tie_word_embeddings and HEAD in found:
        missing, found = [], {**found, EMBEDDINGS: found[HEAD]}
    if missing:
        _refuse_incomplete(folder, missing, unused, config)
    for name, tensor in found.items():
        if tensor.shape != expected[name]:
            raise ValueError(
                f"{folder}: {tensor.name} is {list(tensor.shape)} and its config.json says {list(expected[name])}; "
                "config and weights do not belong together"
            )
        if tensor.dtype not in FLOATS and not _is_mask(name):
            _refuse_quantized(folder, f"{tensor.name} is {tensor.dtype}")
    told = [name for name in unused if not OBSOLETE.search(name)]
    if warns and told:
        logger.warning(
            "%s stores %d tensors that its config.json does not use, such as %s: they are ignored",
            folder,
            len(told),
            told[0],
        )
    return found


def expected_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the model's tensors by name, from a model on the meta device."""
    register_with_transformers()
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except INVALID_CONFIG as error:
        raise ValueError(f"config.json is not valid: {error or type(error).__name__}") from error
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _match(stored: dict[str, StoredTensor], expected, folder: Path) -> tuple[dict[str, StoredTensor], list[str]]:
    """Stored tensors by their name in the model, and the names of the others. The rules of transformers."""
    found: dict[str, StoredTensor] = {}
    unused = []
    for name, tensor in stored.items():
        candidates = (name, PREFIX + name, name.removeprefix(PREFIX))
        target = next((candidate for candidate in candidates if candidate in expected), None)
        if target is None:
            unused.append(name)
        elif target in found:
            raise ValueError(
                f"{folder} holds {target} twice, as {found[target].name} and as {name}; save the model again"
            )
        else:
            found[target] = tensor
    return found, unused


def _refuse_incomplete(folder: Path, missing: list[str], unused: list[str], config: PreTrainedConfig) -> None:
    count = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    like = next((name for name in unused if name.endswith(missing[0])), unused[0] if unused else "")
    held = f"; it holds {len(unused)} others, such as {like}" if unused else ""
    is_ours = config.model_type.startswith("tomoe_")
    advice = "export it again" if is_ours else "save the whole model again with save_pretrained, or download it again"
    raise ValueError(f"{folder} lacks the tensor {missing[0]}{count} of its config.json{held}: {advice}")


def _is_mask(name: str) -> bool:
    return name.endswith((".signature", ".query_key_dims", ".value_dims"))


def check_model(folder: Path, *, may_be_quantized: bool = False) -> None:
    """Raise ``ValueError`` for an incomplete or quantized dense model or ToMoE checkpoint.

    The tensors of families that are not supported are not checked, nor those of quantized models where these are
    allowed: they have names that only their loader knows.
    """
    try:
        check_not_quantized(folder)
    except ValueError:
        if may_be_quantized:
            return
        raise
    config = _read_config(folder)
    if config.model_type.removeprefix("tomoe_") in FAMILIES:
        model_tensors(folder, config, warns=True)


def model_name(folder: Path) -> str:
    """Name of a model folder for cards and records: the last part of its path, or OWNER/NAME in a hub cache."""
    path = folder.absolute().resolve()
    for part in path.parts[::-1]:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    return path.name
