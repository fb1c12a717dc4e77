"""``tomoe::mask_values`` on GPUs in two launches.

    value_down_kernel    partial[s, t, r] = sum over slice s of D of W_down[r] . x[t]
    value_apply_kernel   e = GELU(LayerNorm(sum over s of partial + bias)); out = attention * top-K(W_up e)

The down projection reads 2 MB of float32 weights (R = 128, D = 4,096), so it must use the whole GPU also for one token:
its rows and slices of D make 128 programs. Everything after it needs all of a token's R values: a second launch, one
program a token. The value logits never leave the program.

Top-K counts, for each dim, the dims that come before it: A x A comparisons instead of a sort. Like ``torch.topk`` on a
GPU, it orders logits by their bits (a NaN is the largest) and takes the first of equal ones; like
``tomoe_math.top_mask`` it looks for the smaller side.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tomoe_vllm.kernels.dot.triton import add_product
from tomoe_vllm.kernels.ops import ValueRouter

NORM_EPS = tl.constexpr(1e-5)
"""torch.nn.functional.layer_norm's."""

MAX_SPLITS = 16
"""Slices of D. value_apply_kernel reads one partial sum of each, all at once."""

TARGET_PROGRAMS = 256
"""D is split until value_down_kernel has this many programs: two or so for each multiprocessor."""

UP_ELEMENTS = 16384
"""Elements of W_up that a program holds in registers at once: 64 of each thread of 8 warps."""

HEAD_ELEMENTS = 4096
"""Elements of the attention output that a program multiplies at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DownConfig:
    """Tile of value_down_kernel: ``block_t`` tokens, ``block_r`` rows of W_down, ``block_k`` dims a step."""

    block_t: int
    block_r: int
    block_k: int
    stages: int
    warps: int


FEW_TOKENS = 64
FEW = DownConfig(block_t=16, block_r=16, block_k=64, stages=5, warps=4)
"""Up to FEW_TOKENS tokens: 8 row tiles x 16 slices for R = 128. A slice of D = 4,096 is four steps, all under way."""
MANY = DownConfig(block_t=64, block_r=32, block_k=32, stages=5, warps=4)


@triton.jit(do_not_specialize=["num_tokens"])
def value_down_kernel(
    hidden_states_ptr,  # [T, D] float, rows hidden_states_stride apart
    down_weight_ptr,  # [R, D] float32, contiguous
    partial_ptr,  # out [S, T, R] float32, contiguous: every element is written
    hidden_states_stride,
    num_tokens,  # T
    hidden_size,  # D
    rank,  # R
    slice_size,  # dims of a slice, a multiple of BLOCK_K
    IS_EVEN: tl.constexpr,  # D is a multiple of BLOCK_K
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (ceil(T / BLOCK_T), ceil(R / BLOCK_R), S)."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    rows = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    is_token, is_row, dims = tokens < num_tokens, rows < rank, tl.arange(0, BLOCK_K)
    start = tl.program_id(2) * slice_size
    end = tl.minimum(start + slice_size, hidden_size)
    x_ptr = hidden_states_ptr + tokens[:, None] * hidden_states_stride + dims[None, :]
    weight_ptr = down_weight_ptr + rows[:, None].to(tl.int64) * hidden_size + dims[None, :]
    acc = tl.zeros((BLOCK_R, BLOCK_T), dtype=tl.float32)
    for k in tl.range(start, end, BLOCK_K, num_stages=STAGES):
        if IS_EVEN:
            x = tl.load(x_ptr + k, mask=is_token[:, None], other=0.0)
            weight = tl.load(weight_ptr + k, mask=is_row[:, None], other=0.0)
        else:
            is_dim = (dims < hidden_size - k)[None, :]
            x = tl.load(x_ptr + k, mask=is_token[:, None] & is_dim, other=0.0)
            weight = tl.load(weight_ptr + k, mask=is_row[:, None] & is_dim, other=0.0)
        acc = add_product(weight, x, acc)
    partial_ptr += (tl.program_id(2).to(tl.int64) * num_tokens + tokens[None, :]) * rank + rows[:, None]
    tl.store(partial_ptr, acc, mask=is_row[:, None] & is_token[None, :])


@triton.jit
def load_embedding(partial_ptr, bias_ptr, r, rank, num_splits, split_stride, MAX_SPLITS: tl.constexpr):
    """Sum of the partial sums at ``r``, with bias; the loads of all slices are under way at once."""
    splits = tl.arange(0, MAX_SPLITS)
    is_partial = (splits < num_splits)[:, None] & (r < rank)[None, :]
    partial = tl.load(partial_ptr + splits[:, None] * split_stride + r[None, :], mask=is_partial, other=0.0)
    return tl.sum(partial, axis=0) + tl.load(bias_ptr + r, mask=r < rank, other=0.0)


@triton.jit
def activate_embedding(embedding, mean, inverse, norm_weight_ptr, norm_bias_ptr, r, rank):
    """GELU of the normed embedding; 0 beyond the rank."""
    is_row = r < rank
    scale = tl.load(norm_weight_ptr + r, mask=is_row, other=0.0)
    shift = tl.load(norm_bias_ptr + r, mask=is_row, other=0.0)
    normed = (embedding - mean) * inverse * scale + shift
    gelu = 0.5 * normed * (1.0 + tl.erf(normed * 0.7071067811865476))
    return tl.where(is_row, gelu, 0.0)


@triton.jit
def top_mask(logits, dims, head_dim, width):
    """1.0 for the ``width`` largest of the first ``head_dim`` logits, else 0.0; ties as in ``torch.topk`` on a GPU."""
    bits = logits.to(tl.int32, bitcast=True)
    key = tl.where(logits != logits, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))  # in the order of the floats
    keeps_most = 2 * width > head_dim
    # Of the larger side nothing is searched: keys are negated, so that the dims to find are always the largest.
    key = tl.where(keeps_most, ~key, key)
    other = key[None, :]
    is_before = (other > key[:, None]) | ((other == key[:, None]) & (dims[None, :] < dims[:, None]))
    rank = tl.sum((is_before & (dims < head_dim)[None, :]).to(tl.int32), axis=1)
    is_found = rank < tl.where(keeps_most, head_dim - width, width)
    return tl.where(is_found != keeps_most, 1.0, 0.0)


@triton.jit(do_not_specialize=["num_tokens", "num_splits", "width"])
def value_apply_kernel(
    attention_ptr,  # [T, H * A] float, rows attention_stride apart
    partial_ptr,  # [S, T, R] float32, output of value_down_kernel
    down_bias_ptr,  # [R] float32
    norm_weight_ptr,  # [R] float32
    norm_bias_ptr,  # [R] float32
    up_weight_ptr,  # [A, R] float32, contiguous
    output_ptr,  # out [T, H * A] dtype of attention, contiguous
    attention_stride,
    num_tokens,  # T
    num_splits,  # S
    rank,  # R
    num_heads,  # H
    head_dim,  # A
    width,  # K
    MAX_SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,  # at least R
    CHUNK_R: tl.constexpr,  # columns of W_up that are held at once
    BLOCK_A: tl.constexpr,  # at least A
    BLOCK_H: tl.constexpr,
):
    """Grid (T,): one token. Sums are float32 and in a fixed order."""
    token = tl.program_id(0).to(tl.int64)
    dims, r, heads = tl.arange(0, BLOCK_A), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_H)
    is_dim = dims < head_dim
    # What does not depend on the mask is loaded first, to overlap with its computation.
    columns = heads[:, None] * head_dim + dims[None, :]
    attention_ptr += token * attention_stride
    output_ptr += token * num_heads * head_dim
    values = tl.load(attention_ptr + columns, mask=(heads < num_heads)[:, None] & is_dim[None, :], other=0.0)
    chunk = tl.arange(0, CHUNK_R)
    up_ptr = up_weight_ptr + dims[:, None] * rank + chunk[None, :]
    up = tl.load(up_ptr, mask=is_dim[:, None] & (chunk < rank)[None, :], other=0.0)

    partial_ptr += token * rank
    split_stride = num_tokens.to(tl.int64) * rank
    embedding = load_embedding(partial_ptr, down_bias_ptr, r, rank, num_splits, split_stride, MAX_SPLITS)
    mean = tl.sum(embedding, axis=0) / rank
    centered = tl.where(r < rank, embedding - mean, 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centered * centered, axis=0) / rank + NORM_EPS)
    if CHUNK_R == BLOCK_R:
        activated = activate_embedding(embedding, mean, inverse, norm_weight_ptr, norm_bias_ptr, r, rank)
        logits = tl.sum(up * activated[None, :], axis=1)
    else:
        logits = tl.zeros((BLOCK_A,), dtype=tl.float32)
        for start in range(0, rank, CHUNK_R):
            c = start + chunk
            part = load_embedding(partial_ptr, down_bias_ptr, c, rank, num_splits, split_stride, MAX_SPLITS)
            activated = activate_embedding(part, mean, inverse, norm_weight_ptr, norm_bias_ptr, c, rank)
            up = tl.load(up_ptr + start, mask=is_dim[:, None] & (c < rank)[None, :], other=0.0)
            logits += tl.sum(up * activated[None, :], axis=1)

    mask = top_mask(logits, dims, head_dim, width)
    for start in range(0, num_heads, BLOCK_H):
        is_value = (heads < num_heads - start)[:, None] & is_dim[None, :]
        # Multiplied, not selected: a NaN stays a NaN, as in the reference.
        masked = (values.to(tl.float32) * mask[None, :]).to(output_ptr.dtype.element_ty)
        tl.store(output_ptr + start * head_dim + columns, masked, mask=is_value)
        is_next = (heads < num_heads - start - BLOCK_H)[:, None] & is_dim[None, :]
        values = tl.load(attention_ptr + (start + BLOCK_H) * head_dim + columns, mask=is_next, other=0.0)


def mask_values_triton(attention: Tensor, hidden_states: Tensor, router: ValueRouter, width: int) -> Tensor:
    """See :func:`tomoe_vllm.kernels.value_mask.mask_values`. Captures into a CUDA graph.

    ``attention`` and ``hidden_states`` may have rows of any stride, and different dtypes.
    """
    num_tokens = hidden_states.shape[0]
    head_dim, rank = router.up_weight.shape
    num_heads = attention.shape[1] // head_dim
    assert attention.stride(1) == hidden_states.stride(1) == 1
    assert all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in router)
    output = torch.empty(attention.shape, dtype=attention.dtype, device=attention.device)
    if num_tokens == 0:
        return output
    partial = value_down(hidden_states, router.down_weight)
    block_a, block_r = triton.next_power_of_2(head_dim), triton.next_power_of_2(rank)
    value_apply_kernel[(num_tokens,)](
        attention,
        partial,
        router.down_bias,
        router.norm_weight,
        router.norm_bias,
        router.up_weight,
        output,
        attention.stride(0),
        num_tokens,
        partial.shape[0],
        rank,
        num_heads,
        head_dim,
        width,
        MAX_SPLITS=MAX_SPLITS,
        BLOCK_R=block_r,
        # A head_dim of 256 needs the registers for its comparisons.
        CHUNK_R=min(block_r, max(16, UP_ELEMENTS // (block_a if block_a <= 128 else 4 * block_a))),
        BLOCK_A=block_a,
        BLOCK_H=min(triton.next_power_of_2(num_heads), max(1, HEAD_ELEMENTS // block_a)),
        num_warps=8,
        enable_fp_fusion=True,
    )
    return output


def value_down(hidden_states: Tensor, down_weight: Tensor) -> Tensor:
    """The down projection as partial sums over slices of D: [S, T, R] float32, S at most MAX_SPLITS."""
    (num_tokens, hidden_size), rank = hidden_states.shape, down_weight.shape[0]
    config = FEW if num_tokens <= FEW_TOKENS else MANY
    tiles = triton.cdiv(num_tokens, config.block_t), triton.cdiv(rank, config.block_r)
    num_steps = triton.cdiv(hidden_size, config.block_k)
    num_splits = min(MAX_SPLITS, num_steps, max(1, TARGET_PROGRAMS // (tiles[0] * tiles[1])))
    slice_steps = triton.cdiv(num_steps, num_splits)
    num_splits = triton.cdiv(num_steps, slice_steps)
    partial = torch.empty((num_splits, num_tokens, rank), dtype=torch.float32, device=hidden_states.device)
    value_down_kernel[(*tiles, num_splits)](
        hidden_states,
        down_weight,
        partial,
        hidden_states.stride(0),
        num_tokens,
        hidden_size,
        rank,
        slice_steps * config.block_k,
        IS_EVEN=hidden_size % config.block_k == 0,
        BLOCK_T=config.block_t,
        BLOCK_R=config.block_r,
        BLOCK_K=config.block_k,
        STAGES=config.stages,
        num_warps=config.warps,
        enable_fp_fusion=True,
    )
    return partial
