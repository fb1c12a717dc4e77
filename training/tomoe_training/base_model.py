"""The frozen base model of a run: read tensor by tensor to the device, whole or sharded over the processes (FSDP2).

Parameters are created without memory and filled from the safetensors files, each process reading only the rows that it
keeps. Host memory therefore holds one tensor at a time, and the device never more than the process's share plus the
layer that computes. Layers are gathered when they start, not ahead: that would hold a second layer.
"""

from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AttentionInterface, AutoModelForCausalLM, GenerationConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tomoe_training.artifacts.model_check import model_tensors
from tomoe_training.artifacts.safetensors_io import StoredTensor
from tomoe_training.ranks import num_ranks

CAUSAL_ATTENTION = "tomoe_causal"
"""Name of scaled_dot_product_attention without a mask tensor, in transformers' registry."""


def load_base(folder: Path, config, dtype: torch.dtype, device: torch.device, *, is_sharded: bool):
    """The dense model of a folder in eval mode, without gradients. ``is_sharded``: its decoder layers are divided.

    Embeddings, final norm and lm_head are in every process: the distillation loss reads the weight of lm_head.
    Raises ``ValueError`` for a folder that lacks a tensor or has one of another shape.
    """
    stored = model_tensors(folder, config)
    with init_empty_weights(include_buffers=False):  # rotary frequencies are buffers, and in no file
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.eval().requires_grad_(False)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    if is_sharded:
        mesh = init_device_mesh(device.type, (num_ranks(),))
        for layer in model.model.layers:
            # Linear by linear: while FSDP2 gathers, it holds the parameters twice, as one flat buffer and as tensors.
            linears = [module for module in layer.modules() if isinstance(module, torch.nn.Linear)]
            for module in (*linears, layer):
                # The default keeps a root gathered after its forward pass, and each layer is a root of its own.
                fully_shard(module, mesh=mesh, reshard_after_forward=True)
    is_tied = config.tie_word_embeddings
    for module_name, module in model.named_modules():
        if module in model.model.layers:
            assert not list(module.buffers()), module_name  # to_empty would drop their values
            module.to_empty(device=device)
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{module_name}.{name}"
            if is_tied and module is model.get_output_embeddings() and name == "weight":
                continue
            if parameter.is_meta:
                parameter = torch.nn.Parameter(torch.empty_like(parameter, device=device), requires_grad=False)
                module.register_parameter(name, parameter)
            _read(stored[full_name], parameter)
    model.tie_weights()
    return model.to(device)


@torch.no_grad()
def _read(stored: StoredTensor, parameter: Tensor) -> None:
    """Fill a parameter, or the rows of it that this process keeps, with a stored tensor of any float dtype."""
    with safe_open(stored.file, framework="pt") as stream:
        if isinstance(parameter, DTensor):
            local = parameter.to_local()
            first = dist.get_rank() * -(-len(parameter) // num_ranks())  # FSDP2 divides rows as torch.chunk does
            if len(local):
                local.copy_(stream.get_slice(stored.name)[first : first + len(local)])
        else:
            parameter.copy_(stream.get_tensor(stored.name))


def use_causal_attention(model, sequence_length: int) -> None:
    """Make attention causal without a mask, for batches without padding.

    transformers otherwise looks at the values of position ids to find packed sequences, which waits for the device in
    every forward pass. The attention function is the same. No effect where a sliding window is shorter than the
    sequence: that needs a mask.
    """
    window = getattr(model.config, "sliding_window", None)
    if window is None or window >= sequence_length:
        AttentionInterface.register(CAUSAL_ATTENTION, sdpa_attention_forward)
        model.set_attn_implementation(CAUSAL_ATTENTION)
