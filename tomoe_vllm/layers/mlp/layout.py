"""Chooses the layout of the experts' weights for a model. All three layouts give the same output.

    masked   vLLM's own linears with the routed expert's mask between them (``masked.py``). Tensor parallelism,
             quantization and LoRA work as for the dense model; it saves nothing
    shared   one copy of the weights, one row per neuron; each token reads the rows of its expert only (``shared.py``)
    fused    vLLM's fused MoE with one matrix per expert, at several times the memory (``fused.py``)

``expert_layout`` of the config chooses (``--hf-overrides '{"expert_layout": "masked"}'``), once per model
(:func:`decide_layout`). The default is ``auto``: :func:`choose_layout`. Within the shared layout
``kernels/expert_mlp/triton/dispatch.py`` chooses the GPU kernel of each step; CPUs have one kernel.
"""

import logging

import torch
from torch import nn
from transformers import PreTrainedConfig
from vllm.config import get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_world_size, get_tp_group
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.platforms import current_platform

from tomoe_vllm.diagnostics.roofline import WORTH_IT, chip_named
from tomoe_vllm.diagnostics.step_cost import ModelShape, Step, speed
from tomoe_vllm.hf.configuration_tomoe import block_shape
from tomoe_vllm.kernels import build
from tomoe_vllm.kernels.expert_mlp.triton import dispatch
from tomoe_vllm.layers.mlp.fused import CPU_MULTIPLE, ToMoEFusedMLP, fused_parameters
from tomoe_vllm.layers.mlp.masked import ToMoEMaskedMLP
from tomoe_vllm.layers.mlp.shared import ToMoESharedMLP

logger = logging.getLogger(__name__)

EXPERT_LAYOUTS = ("auto", "shared", "masked", "fused")
FUSED_MAX_DECODES = 2
"""Decoding this many tokens at once, one matrix per expert reads no more than the dense MLP (docs/performance.md)."""


def decide_layout(config: PreTrainedConfig, quant_config: QuantizationConfig | None) -> str:
    """The layout of all layers of the model that is being built: :func:`choose_layout`, logged once.

    It is decided once per model, because the answer may change while layers are built: each takes memory that is free
    for the fused layout. All tensor-parallel ranks use one layout. Where ``auto`` would choose different ones, because
    the ranks are not equally free or not equally validated, it is ``masked``. Raises as :func:`choose_layout` does.
    """
    layout, reason = choose_layout(config, quant_config)
    chosen = gather_from_ranks(layout)
    if len(set(chosen)) > 1:
        layout = "masked"
        reason = f"the tensor-parallel ranks would choose different layouts ({', '.join(chosen)})"
    logger.info("ToMoE expert layout: %s, because %s", layout, reason)
    if layout != "fused" and getattr(config, "expert_layout", "auto") == "auto":
        slowest = predicted_speed(config, quant_config, "masked" if layout == "masked" else "shared dense")
        if slowest is not None and slowest[0] < WORTH_IT:
            logger.warning(
                "ToMoE: the cost model predicts %.2f x the dense model for %s on this %s, because of "
                "the routers' launches, and no other layout is available (docs/performance.md)",
                *slowest,
                dispatch.device_name(),
            )
    return layout


def gather_from_ranks(value: str) -> list[str]:
    """``value`` of every tensor-parallel rank."""
    num_ranks = get_tensor_model_parallel_world_size()
    if num_ranks == 1:
        return [value]
    values = [""] * num_ranks
    torch.distributed.all_gather_object(values, value, group=get_tp_group().cpu_group)
    return values


def choose_layout(config: PreTrainedConfig, quant_config: QuantizationConfig | None) -> tuple[str, str]:
    """The layout for ``config.expert_layout`` on this rank, and the reason in a few words.

    ``auto`` takes ``shared`` where it is available and, on a GPU, where ``tomoe tune`` measured that it is worth it.
    Otherwise it takes ``fused`` on a GPU with enough free memory that never decodes more than ``FUSED_MAX_DECODES``
    sequences at once, and ``masked`` everywhere else. On a CPU ``auto`` never takes ``fused``.

    Raises ``ValueError`` for an unknown layout, or for one that is unavailable, with the reason.
    """
    layout = getattr(config, "expert_layout", "auto")
    if layout not in EXPERT_LAYOUTS:
        raise ValueError(f"expert_layout is {layout!r}; it must be one of {', '.join(EXPERT_LAYOUTS)}")
    if layout == "auto":
        not_shared = why_not_shared(quant_config)
        if not_shared is None:
            not_shared, gain = what_shared_gains(config)
            if not_shared is None:
                return "shared", gain
        not_fused = why_not_fused_in_auto(config, quant_config)
        if not_fused is None:
            return "fused", f"not shared ({not_shared}), and there is enough free memory"
        return "masked", f"not shared ({not_shared}) and not fused ({not_fused})"
    reason = None
    if layout == "shared":
        reason = why_not_shared(quant_config)
    elif layout == "fused":
        reason = why_not_fused(config, quant_config)
    if reason is not None:
        raise ValueError(f"expert_layout is {layout!r}, but {reason}; use 'auto' or 'masked'")
    return layout, "expert_layout asks for it"


def make_expert_mlp(
    layout: str,
    config: PreTrainedConfig,
    layer_idx: int,
    *,
    bias: bool,
    quant_config: QuantizationConfig | None,
    prefix: str,
) -> nn.Module:
    """Build the MLP of one layer in ``layout``, the one of :func:`decide_layout`.

    Raises ``ValueError`` for an unsupported activation, or a tensor parallel size that does not divide the neurons.
    """
    if layout == "shared":
        return ToMoESharedMLP(config, layer_idx, has_bias=bias, prefix=prefix)
    if layout == "fused":
        return ToMoEFusedMLP(config, layer_idx, has_bias=bias, prefix=prefix)
    return ToMoEMaskedMLP(config, layer_idx, bias=bias, quant_config=quant_config, prefix=prefix)


def _why_only_vllm_linears(quant_config: QuantizationConfig | None) -> str | None:
    """Why this model needs vLLM's own linears, or None."""
    if quant_config is not None:
        return f"the checkpoint is quantized ({quant_config.get_name()})"
    if get_current_vllm_config().lora_config is not None:
        return "LoRA adapters wrap vLLM's own linears"
    return None


def why_not_shared(quant_config: QuantizationConfig | None) -> str | None:
    """Why the shared layout is unavailable for the model that is being built, or None."""
    if (reason := _why_only_vllm_linears(quant_config)) is not None:
        return reason
    if current_platform.is_cuda():
        return why_not_shared_on_gpu()
    if not current_platform.is_cpu():
        return "it has no kernels for this platform"
    if (dtype := torch.get_default_dtype()) != torch.float32:
        return f"its CPU kernels take float32 and the model's dtype is {str(dtype).removeprefix('torch.')}"
    if not build.load():
        return "its CPU kernels could not be compiled"
    return None


def why_not_shared_on_gpu() -> str | None:
    """Why the shared layout is unavailable on the current GPU. None: the GPU op is registered."""
    device = dispatch.device_name()
    validation = dispatch.read_validation(device)
    if validation is None:
        return f"its GPU kernels were not checked on this {device}; run: tomoe doctor"
    if not validation.agrees:
        return f"`tomoe doctor` found its GPU kernels wrong on this {device}: {validation.failures[0]}"
    dispatch.register()
    return None


def what_shared_gains(config: PreTrainedConfig) -> tuple[str | None, str]:
    """Why ``auto`` does not choose the available shared layout, or None; and what it gains, in a few words.

    On a GPU its dense path saves nothing, so a tuned table must select a sparse path, in some layer, for a number of
    tokens that this engine can reach.
    """
    if not current_platform.is_cuda():
        return None, "its kernels work here"
    smallest, _, largest = _engine_steps()
    shapes = sorted(set(layer_shapes(config)), key=lambda shape: shape.width)
    ranges = [dispatch.load_thresholds(shape).sparse_range(smallest, largest) for shape in shapes]
    gain = next(filter(None, ranges), None)
    if gain is not None:
        return None, f"`tomoe tune` measured on this {dispatch.device_name()} that it is faster: {gain}"
    if any(dispatch.read_table(shape) for shape in shapes):
        return f"`tomoe tune` found it no faster than dense for steps of {smallest} to {largest} tokens", ""
    return f"it was not measured on this {dispatch.device_name()}; run: tomoe tune --model DIR", ""


def _engine_steps() -> tuple[int, int, int]:
    """Fewest and most tokens of a decode step of the engine that is being built, and most tokens of any step."""
    engine = get_current_vllm_config()
    speculative, scheduler = engine.speculative_config, engine.scheduler_config
    per_sequence = 1 + ((speculative.num_speculative_tokens or 0) if speculative else 0)
    return per_sequence, per_sequence * scheduler.max_num_seqs, scheduler.max_num_batched_tokens


def predicted_speed(
    config: PreTrainedConfig, quant_config: QuantizationConfig | None, layout: str
) -> tuple[float, str] | None:
    """Least predicted speed of any step of this engine relative to dense, to two digits, and the step in words.

    ``layout``: a key of ``step_cost.step_seconds``. None where the cost model knows nothing: on CPUs, on GPUs that are
    not in ``roofline.CHIPS``, in float32.
    """
    chip = chip_named(dispatch.device_name())
    if chip is None or (dtype := torch.get_default_dtype()) == torch.float32:
        return None
    bits = getattr(quant_config, "weight_bits", 8 if quant_config else None)
    itemsize = bits / 8 if isinstance(bits, int) else dtype.itemsize
    model = ModelShape.of(config, itemsize, get_tensor_model_parallel_world_size())
    speeds = ((speed(model, layout, step, chip), step.describe()) for step in Step.reachable(*_engine_steps()))
    slowest, step = min(speeds)
    return round(slowest, 2), step


def layer_shapes(config: PreTrainedConfig) -> list[dispatch.LayerShape]:
    """Shape of every layer on one tensor-parallel rank, by which tuned tables are found."""
    tp_size = get_tensor_model_parallel_world_size()
    return [
        dispatch.LayerShape(
            hidden_size=config.hidden_size,
            num_neurons=config.intermediate_size // tp_size,
            num_experts=config.num_experts,
            width=-(-width // tp_size),
            num_matrices=block_shape(config).num_mlp_matrices,
            dtype=torch.get_default_dtype(),
        )
        for width in config.expert_intermediate_sizes
    ]


def why_not_fused(config: PreTrainedConfig, quant_config: QuantizationConfig | None) -> str | None:
    """Why the fused layout is unavailable for the model that is being built, or None."""
    if (reason := _why_only_vllm_linears(quant_config)) is not None:
        return reason
    if block_shape(config).num_mlp_matrices != 3:
        return "vLLM's fused MoE needs an MLP with a gate"
    if config.hidden_act != "silu":
        return f"only silu was tested in vLLM's fused MoE and hidden_act is {config.hidden_act!r}"
    if current_platform.is_cpu() and config.hidden_size % CPU_MULTIPLE:
        return f"vLLM's CPU kernel needs a hidden_size divisible by {CPU_MULTIPLE}; it is {config.hidden_size}"
    return None


def why_not_fused_in_auto(config: PreTrainedConfig, quant_config: QuantizationConfig | None) -> str | None:
    """Why ``auto`` does not choose the fused layout, or None.

    From about three tokens per decode step the fused layout reads more than the dense model, so the number of
    sequences must be bounded, and the cost model must not predict a slower step. Its experts may take at most half of
    the free memory; the rest is for the KV cache.
    """
    if (reason := why_not_fused(config, quant_config)) is not None:
        return reason
    if not current_platform.is_cuda():
        return "it is worth its memory on GPUs only"
    _, max_decodes, _ = _engine_steps()
    if max_decodes > FUSED_MAX_DECODES:
        return (
            f"up to {max_decodes} tokens are decoded at once (--max-num-seqs), and with more than "
            f"{FUSED_MAX_DECODES} it reads more than the dense model"
        )
    slowest = predicted_speed(config, quant_config, "fused")
    if slowest is not None and slowest[0] < WORTH_IT:
        return f"the cost model predicts {slowest[0]:.2f} x the dense model for {slowest[1]}"
    needed = fused_parameters(config) * torch.get_default_dtype().itemsize
    free, _ = torch.cuda.mem_get_info()
    if needed > free / 2:
        return f"its experts need {needed / 2**30:.1f} GiB, more than half of the {free / 2**30:.1f} GiB that are free"
    return None
