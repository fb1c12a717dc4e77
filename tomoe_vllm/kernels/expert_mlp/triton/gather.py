"""The ``gather`` path, for one to three tokens: reads only the rows of each token's expert.

A matrix-vector product is bound by memory, so it runs on the plain cores and no tensor-core tile is padded. Two kernels
and a small reduction:

    gather_up      hidden[t, j] = act(gate row j . x) * (up row j . x),  j-th neuron of token t's expert
    gather_down    partial[s, t] = sum over a slice s of the neurons of hidden[t, j] * down row j
    gather_reduce  output[t] = sum over s of partial[s, t], in the order of s: deterministic, no atomics

Rows are contiguous, so a gathered row streams as 16-byte asynchronous copies. In gather_up the row indices are known
before the loop. In gather_down each step needs new ones; they are loaded one step ahead and carried without a cast. An
index loaded in the step that uses it costs the pipeline its depth, and a carried cast costs all overlap
(tests/tomoe_vllm/kernels/test_triton_compile.py).

Two tokens of the same expert read its rows twice; the second read usually hits L2.

Shapes: T tokens, D hidden_size, F neurons, N experts, W = neuron_ids.shape[1], H = W rounded up to the tile.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tomoe_vllm.kernels.expert_activation.triton import KERNEL_ACTIVATIONS, activate
from tomoe_vllm.kernels.ops import ExpertTensors


@dataclass(frozen=True, kw_only=True, slots=True)
class GatherConfig:
    """Tile sizes. For LLaMA-2 7B at p = 0.5 the defaults give 344 and 256 programs with 32 and 24 KB in flight each.

    Never timed on a GPU. Chosen so that the bytes in flight are several times bandwidth x latency (A100: 2 TB/s x
    0.8 us = 1.6 MB), and so that all programs of gather_up are resident at once: shared memory and registers allow
    four on each of the 108 multiprocessors of an A100. With a fourth stage 20 programs would run as a tail.
    After a change run tests/tomoe_vllm/kernels/test_triton_compile.py and ``tomoe doctor``.
    """

    up_block_n: int = 16  # neurons per program
    up_block_k: int = 256  # dims of hidden_size per step
    up_stages: int = 3
    up_warps: int = 4
    down_block_n: int = 128  # dims of hidden_size per program
    down_block_k: int = 32  # neurons per step
    down_stages: int = 4
    down_warps: int = 4
    split_k: int = 8  # slices of an expert's neurons
    reduce_block: int = 512


@triton.jit
def gather_up_kernel(
    hidden_states_ptr,  # [T, D] float, rows hidden_states_stride apart
    expert_ids_ptr,  # [T] int32 or int64
    up_weight_ptr,  # [2F, D] gate rows first, or [F, D]; contiguous, dtype of hidden_states
    up_bias_ptr,  # [2F] or [F], or None
    neuron_ids_ptr,  # [N, W] int32, contiguous; the first widths[n] entries of row n are valid
    widths_ptr,  # [N] int32
    hidden_ptr,  # out [T, H], dtype of hidden_states; written up to the end of the last tile of the width
    hidden_states_stride,
    hidden_size,  # D
    num_neurons,  # F
    table_width,  # W
    hidden_stride,  # H
    ACTIVATION: tl.constexpr,
    IS_GATED: tl.constexpr,
    IS_EVEN: tl.constexpr,  # D is a multiple of BLOCK_K
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (T, ceil(W / BLOCK_N)): BLOCK_N neurons of one token. Tiles past the expert's width return immediately.

    Tokens are the fastest grid dimension, so tokens of the same expert share its rows in L2. Sums are float32 and in a
    fixed order.
    """
    token = tl.program_id(0).to(tl.int64)
    expert = tl.load(expert_ids_ptr + token).to(tl.int64)
    width = tl.load(widths_ptr + expert)
    start = tl.program_id(1) * BLOCK_N
    if start >= width:
        return
    columns = start + tl.arange(0, BLOCK_N)
    rows = tl.load(neuron_ids_ptr + expert * table_width + columns, mask=columns < width, other=0).to(tl.int64)
    dims = tl.arange(0, BLOCK_K)
    x_ptr = hidden_states_ptr + token * hidden_states_stride + dims
    gate_ptr = up_weight_ptr + rows.to(tl.int64)[:, None] * hidden_size + dims[None, :]
    up_ptr = gate_ptr + num_neurons.to(tl.int64) * hidden_size
    gate = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    up = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for k in tl.range(0, hidden_size, BLOCK_K, num_stages=STAGES):
        if IS_EVEN:
            x = tl.load(x_ptr + k).to(tl.float32)
            gate += tl.load(gate_ptr + k).to(tl.float32) * x[None, :]
            if IS_GATED:
                up += tl.load(up_ptr + k).to(tl.float32) * x[None, :]
        else:
            is_dim = dims < hidden_size - k
            x = tl.load(x_ptr + k, mask=is_dim, other=0.0).to(tl.float32)
            gate += tl.load(gate_ptr + k, mask=is_dim[None, :], other=0.0).to(tl.float32) * x[None, :]
            if IS_GATED:
                up += tl.load(up_ptr + k, mask=is_dim[None, :], other=0.0).to(tl.float32) * x[None, :]
    hidden = tl.sum(gate, axis=1)
    if up_bias_ptr is not None:
        hidden += tl.load(up_bias_ptr + rows).to(tl.float32)
    hidden = activate(hidden, ACTIVATION)
    if IS_GATED:
        factor = tl.sum(up, axis=1)
        if up_bias_ptr is not None:
            factor += tl.load(up_bias_ptr + num_neurons + rows).to(tl.float32)
        hidden *= factor
    hidden = tl.where(columns < width, hidden, 0.0)
    tl.store(hidden_ptr + token * hidden_stride + columns, hidden.to(hidden_ptr.dtype.element_ty))


@triton.jit
def gather_down_kernel(
    hidden_ptr,  # [T, H] float, output of gather_up
    expert_ids_ptr,  # [T] int32 or int64
    down_weight_ptr,  # [F, D] contiguous, dtype of hidden
    neuron_ids_ptr,  # [N, W] int32, contiguous
    widths_ptr,  # [N] int32
    partial_ptr,  # out [SPLIT_K, T, D] float32, contiguous: every element is written
    hidden_stride,  # H
    hidden_size,  # D
    table_width,  # W
    IS_EVEN: tl.constexpr,  # D is a multiple of BLOCK_N
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (T, ceil(D / BLOCK_N), SPLIT_K): BLOCK_N output dims of one token over one slice of its neurons."""
    token = tl.program_id(0).to(tl.int64)
    split = tl.program_id(2)
    expert = tl.load(expert_ids_ptr + token).to(tl.int64)
    width = tl.load(widths_ptr + expert)
    slice_size = tl.cdiv(tl.cdiv(width, BLOCK_K), SPLIT_K) * BLOCK_K
    start = split * slice_size
    end = tl.minimum(start + slice_size, width)
    dims = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_dim = dims < hidden_size
    columns = tl.arange(0, BLOCK_K)
    table_ptr = neuron_ids_ptr + expert * table_width + columns
    values_ptr = hidden_ptr + token * hidden_stride + columns
    weight_ptr = down_weight_ptr + dims[None, :]
    acc = tl.zeros((BLOCK_K, BLOCK_N), dtype=tl.float32)
    rows = tl.load(table_ptr + start, mask=columns < end - start, other=0)
    values = tl.load(values_ptr + start, mask=columns < end - start, other=0.0)
    for k in tl.range(start, end, BLOCK_K, num_stages=STAGES):
        if IS_EVEN:
            weight = tl.load(weight_ptr + rows.to(tl.int64)[:, None] * hidden_size)
        else:
            weight = tl.load(weight_ptr + rows.to(tl.int64)[:, None] * hidden_size, mask=is_dim[None, :], other=0.0)
        acc += weight.to(tl.float32) * values.to(tl.float32)[:, None]
        is_next = columns < end - k - BLOCK_K
        rows = tl.load(table_ptr + k + BLOCK_K, mask=is_next, other=0)
        values = tl.load(values_ptr + k + BLOCK_K, mask=is_next, other=0.0)
    output_ptr = partial_ptr + (split * tl.num_programs(0) + token) * hidden_size + dims
    tl.store(output_ptr, tl.sum(acc, axis=0), mask=is_dim)


@triton.jit
def gather_reduce_kernel(
    partial_ptr,  # [SPLIT_K, T, D] float32, contiguous
    output_ptr,  # out [T, D] float, contiguous
    num_values,  # T * D
    SPLIT_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (ceil(T * D / BLOCK),)."""
    positions = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_value = positions < num_values
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in tl.static_range(SPLIT_K):
        acc += tl.load(partial_ptr + split * num_values + positions, mask=is_value, other=0.0)
    tl.store(output_ptr + positions, acc.to(output_ptr.dtype.element_ty), mask=is_value)


def expert_mlp_gather(
    hidden_states: Tensor, expert_ids: Tensor, weights: ExpertTensors, config: GatherConfig | None = None
) -> Tensor:
    """The expert MLP of a few tokens. Arguments and result: :func:`.dispatch.expert_mlp_cuda`, which checks them.

    Correct for any number of tokens; with more than about three, other paths are faster.
    """
    config = config or GatherConfig()
    if hidden_states.shape[0] == 0:
        return torch.empty_like(hidden_states)
    hidden = _gather_up(hidden_states, expert_ids, weights, config)
    partial = _gather_down(hidden, expert_ids, weights, config)
    output = hidden_states.new_empty(hidden_states.shape)
    gather_reduce_kernel[(triton.cdiv(output.numel(), config.reduce_block),)](
        partial,
        output,
        output.numel(),
        SPLIT_K=config.split_k,
        BLOCK=config.reduce_block,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return output


def _gather_up(hidden_states: Tensor, expert_ids: Tensor, weights: ExpertTensors, config: GatherConfig) -> Tensor:
    """Returns ``hidden`` [T, H] of the dtype of ``hidden_states``."""
    num_tokens, hidden_size = hidden_states.shape
    num_neurons, table_width = weights.down.shape[0], weights.neuron_ids.shape[1]
    num_tiles = triton.cdiv(table_width, config.up_block_n)
    hidden = hidden_states.new_empty((num_tokens, num_tiles * config.up_block_n))
    gather_up_kernel[(num_tokens, num_tiles)](
        hidden_states,
        expert_ids,
        weights.up,
        weights.up_bias,
        weights.neuron_ids,
        weights.widths,
        hidden,
        hidden_states.stride(0),
        hidden_size,
        num_neurons,
        table_width,
        hidden.shape[1],
        ACTIVATION=KERNEL_ACTIVATIONS[weights.activation],
        IS_GATED=weights.up.shape[0] != num_neurons,
        IS_EVEN=hidden_size % config.up_block_k == 0,
        BLOCK_N=config.up_block_n,
        BLOCK_K=config.up_block_k,
        STAGES=config.up_stages,
        num_warps=config.up_warps,
        enable_fp_fusion=True,
    )
    return hidden


def _gather_down(hidden: Tensor, expert_ids: Tensor, weights: ExpertTensors, config: GatherConfig) -> Tensor:
    """Returns ``partial`` [SPLIT_K, T, D] float32."""
    num_tokens, hidden_size = hidden.shape[0], weights.down.shape[1]
    partial = hidden.new_empty((config.split_k, num_tokens, hidden_size), dtype=torch.float32)
    gather_down_kernel[(num_tokens, triton.cdiv(hidden_size, config.down_block_n), config.split_k)](
        hidden,
        expert_ids,
        weights.down,
        weights.neuron_ids,
        weights.widths,
        partial,
        hidden.shape[1],
        hidden_size,
        weights.neuron_ids.shape[1],
        IS_EVEN=hidden_size % config.down_block_n == 0,
        BLOCK_N=config.down_block_n,
        BLOCK_K=config.down_block_k,
        SPLIT_K=config.split_k,
        STAGES=config.down_stages,
        num_warps=config.down_warps,
        enable_fp_fusion=True,
    )
    return partial
