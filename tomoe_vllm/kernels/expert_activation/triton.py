"""The expert activation as one Triton kernel, for CUDA outside torch.compile.

Under torch.compile, inductor already fuses the plain-torch version. This kernel serves the opaque op
``tomoe::expert_mlp`` and eager mode, where five elementwise kernels would each pass over [T, F].
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

KERNEL_ACTIVATIONS = {
    "silu": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""Name in :func:`activate` of each Hugging Face ``hidden_act``."""

BLOCK = 1024
"""Columns per program: one 16-byte load (8 bf16 values) for each of 128 threads."""


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """``ACTIVATION`` of a float32 block of any shape. 0.5 (1 + tanh(a)) is written as sigmoid(2 a)."""
    if ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "relu":
        return tl.maximum(x, 0.0)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh", "unknown activation")
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))


@triton.jit
def expert_activation_kernel(
    projected_ptr,  # [T, 2F] gate first, or [T, F]; float; rows projected_stride apart
    expert_ids_ptr,  # [T] int32 or int64
    masks_ptr,  # [N, F] bool, uint8 or float, contiguous: non-zero where the expert keeps the neuron
    output_ptr,  # [T, F] dtype of projected, contiguous
    projected_stride,
    num_neurons,  # F
    ACTIVATION: tl.constexpr,
    IS_GATED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (T, ceil(F / BLOCK)): BLOCK neurons of one token. Computes in float32 and rounds once, at the store."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_neuron = columns < num_neurons
    expert = tl.load(expert_ids_ptr + token).to(tl.int64)
    row_ptr = projected_ptr + token * projected_stride + columns
    hidden = activate(tl.load(row_ptr, mask=is_neuron, other=0.0).to(tl.float32), ACTIVATION)
    if IS_GATED:
        hidden *= tl.load(row_ptr + num_neurons, mask=is_neuron, other=0.0).to(tl.float32)
    mask = tl.load(masks_ptr + expert * num_neurons + columns, mask=is_neuron, other=0)
    hidden = tl.where(mask != 0, hidden, 0.0)
    output_ptr += token * num_neurons + columns
    tl.store(output_ptr, hidden.to(output_ptr.dtype.element_ty), mask=is_neuron)


def expert_activation_triton(projected: Tensor, expert_ids: Tensor, expert_masks: Tensor, activation: str) -> Tensor:
    """See :func:`tomoe_vllm.kernels.expert_activation.expert_activation`. Masks may have any dtype; uint8 reads least.

    ``projected`` may be a view with rows of any stride and contiguous columns. The caller checks shapes and names.
    """
    num_tokens, num_columns = projected.shape
    num_neurons = expert_masks.shape[1]
    assert projected.stride(1) == 1
    assert expert_masks.is_contiguous()
    output = torch.empty((num_tokens, num_neurons), dtype=projected.dtype, device=projected.device)
    if num_tokens == 0:
        return output
    expert_activation_kernel[(num_tokens, triton.cdiv(num_neurons, BLOCK))](
        projected,
        expert_ids,
        expert_masks.view(torch.uint8) if expert_masks.dtype == torch.bool else expert_masks,
        output,
        projected.stride(0),
        num_neurons,
        ACTIVATION=KERNEL_ACTIVATIONS[activation],
        IS_GATED=num_columns != num_neurons,
        BLOCK=BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return output
