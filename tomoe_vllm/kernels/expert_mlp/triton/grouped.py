"""The ``grouped`` path, for many tokens: sorts tokens by expert and multiplies each group with its expert's rows.

    group_tokens   slots: the tokens sorted by expert, each expert's group padded to a multiple of BLOCK_M
    grouped_up     hidden[t, j] = act(gate row j . x) * (up row j . x),  j-th neuron of token t's expert
    grouped_down   output[t] = sum over the neurons of hidden[t, j] * down row j

Both GEMMs index the rows of one shared matrix. Experts overlap, so programs that run at the same time work on one
window of neurons (grouped_up) or of output dims (grouped_down) for all experts: a row is read from memory once, and
from L2 by the other experts. Neurons are in their natural order, in which tile t of every expert covers nearly the same
neurons.

All buffers and grids have their upper-bound size: M + N * (BLOCK_M - 1) slots. Programs without work read that from the
device and return immediately. There is no host sync, no data-dependent shape, no autotuning, and one binary of a config
for every number of tokens, so a CUDA graph can capture it. The price is padding of up to BLOCK_M - 1 rows per expert.

Shapes: M tokens (T elsewhere), D hidden_size, F neurons, N experts, W = neuron_ids.shape[1], H = W rounded up to
BLOCK_N.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from tomoe_vllm.kernels.expert_activation.triton import KERNEL_ACTIVATIONS, activate
from tomoe_vllm.kernels.ops import ExpertTensors


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupedConfig:
    """Tile sizes. ``up_block_n`` must be a multiple of ``down_block_k``: hidden is zero up to the end of its tile."""

    block_m: int  # tokens
    up_block_n: int  # neurons
    up_block_k: int = 64  # dims of hidden_size per step
    up_stages: int = 4
    up_warps: int = 8
    down_block_n: int = 128  # dims of hidden_size
    down_block_k: int = 64  # neurons per step
    down_stages: int = 4
    down_warps: int = 8


def grouped_config(num_tokens: int, num_experts: int, capability: tuple[int, int], itemsize: int = 2) -> GroupedConfig:
    """Tiles by mean tokens per expert, CUDA capability and bytes per weight. A static table, never timed on a GPU.

    More than 64 rows per expert fill more than half of a 128-row tile. On A100, 128 tokens x 64 neurons with two
    accumulators is the largest tile that does not spill (128 x 128 spills 376 bytes); with wgmma on H100, 128 x 128
    does not. GPUs with 99 KB of shared memory per block (A10, L4, consumer cards), and unknown ones, get one buffer
    less. Float32 runs on the plain cores (no TF32), in small tiles.

    tests/tomoe_vllm/kernels/test_triton_compile.py compiles every entry: no spills, shared memory within the limit of
    the chip, the tensor-core instruction. Run it and ``tomoe doctor`` after a change.
    """
    if itemsize > 2:
        return GroupedConfig(
            block_m=32,
            up_block_n=64,
            up_block_k=32,
            up_stages=3,
            up_warps=4,
            down_block_n=64,
            down_block_k=32,
            down_stages=3,
            down_warps=4,
        )
    has_large_memory = capability in ((8, 0), (9, 0), (10, 0))
    stages = {} if has_large_memory else {"up_stages": 3, "down_stages": 3}
    mean = num_tokens / num_experts
    if mean <= 64:
        return GroupedConfig(block_m=16 if mean <= 16 else 64, up_block_n=64, up_warps=4, down_warps=4, **stages)
    return GroupedConfig(block_m=128, up_block_n=128 if capability == (9, 0) else 64, **stages)


@triton.jit(do_not_specialize=["num_tokens"])
def group_tokens_kernel(
    expert_ids_ptr,  # [M] int32 or int64
    slots_ptr,  # out [at most M + N * BLOCK_M] int32: token of each slot, M for padding
    block_experts_ptr,  # out [number of slots / BLOCK_M, rounded up] int32: expert of each block in use
    num_blocks_ptr,  # out [1] int32: blocks in use
    num_tokens,  # M
    NUM_EXPERTS: tl.constexpr,  # N
    EXPERTS: tl.constexpr,  # N rounded up to a power of two
    BLOCK_M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (N,): program e counts the tokens of all experts, then writes those of expert e in order: a stable sort.

    Slots past the last block in use are neither written nor read.
    """
    expert = tl.program_id(0)
    experts = tl.arange(0, EXPERTS)
    positions = tl.arange(0, BLOCK)
    counts = tl.zeros((EXPERTS,), dtype=tl.int32)
    for start in tl.range(0, num_tokens, BLOCK):
        ids = tl.load(expert_ids_ptr + start + positions, mask=positions < num_tokens - start, other=-1).to(tl.int32)
        counts += tl.sum((ids[:, None] == experts[None, :]).to(tl.int32), axis=0)
    blocks = (counts + BLOCK_M - 1) // BLOCK_M
    first_block = tl.sum(tl.where(experts < expert, blocks, 0), axis=0)
    own_blocks = tl.sum(tl.where(experts == expert, blocks, 0), axis=0)
    own_tokens = tl.sum(tl.where(experts == expert, counts, 0), axis=0)
    if expert == NUM_EXPERTS - 1:
        tl.store(num_blocks_ptr, tl.sum(blocks, axis=0))
    for start in tl.range(0, own_blocks, BLOCK):
        tl.store(block_experts_ptr + first_block + start + positions, expert, mask=positions < own_blocks - start)
    padding = tl.arange(0, BLOCK_M)
    padding_start = first_block * BLOCK_M + own_tokens
    is_padding = padding < own_blocks * BLOCK_M - own_tokens
    tl.store(slots_ptr + padding_start + padding, num_tokens, mask=is_padding)
    slot = first_block * BLOCK_M
    for start in tl.range(0, num_tokens, BLOCK):
        ids = tl.load(expert_ids_ptr + start + positions, mask=positions < num_tokens - start, other=-1).to(tl.int32)
        is_own = (ids == expert).to(tl.int32)
        rank = tl.cumsum(is_own, axis=0) - 1
        tl.store(slots_ptr + slot + rank, start + positions, mask=is_own > 0)
        slot += tl.sum(is_own, axis=0)


@triton.jit(do_not_specialize=["num_tokens"])
def grouped_up_kernel(
    hidden_states_ptr,  # [M, D] float, rows hidden_states_stride apart
    up_weight_ptr,  # [2F, D] gate rows first, or [F, D]; contiguous, dtype of hidden_states
    up_bias_ptr,  # [2F] or [F], or None
    neuron_ids_ptr,  # [N, W] int32, contiguous; the first widths[n] entries of row n are valid
    widths_ptr,  # [N] int32
    slots_ptr,  # int32, from group_tokens
    block_experts_ptr,  # int32, from group_tokens
    num_blocks_ptr,  # [1] int32, from group_tokens
    hidden_ptr,  # out [M, H], dtype of hidden_states; zero from the width to the end of its tile
    num_tokens,  # M
    hidden_states_stride,
    hidden_size,  # D
    num_neurons,  # F
    table_width,  # W
    hidden_stride,  # H
    ACTIVATION: tl.constexpr,
    IS_GATED: tl.constexpr,
    IS_EVEN: tl.constexpr,  # D is a multiple of BLOCK_K
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (max blocks * ceil(W / BLOCK_N),): BLOCK_M slots of one expert, BLOCK_N of its neurons.

    Blocks in use are the fastest dimension: all experts of one window of neurons run together, and the programs
    without work come last. Padded slots compute token 0 again and store nothing.
    """
    num_blocks = tl.load(num_blocks_ptr)
    block = tl.program_id(0) % num_blocks
    start = tl.program_id(0) // num_blocks * BLOCK_N
    expert = tl.load(block_experts_ptr + block).to(tl.int64)
    width = tl.load(widths_ptr + expert)
    if start >= width:
        return
    tokens = tl.load(slots_ptr + block * BLOCK_M + tl.arange(0, BLOCK_M))
    is_token = tokens < num_tokens
    token_rows = tl.where(is_token, tokens, 0).to(tl.int64)
    columns = start + tl.arange(0, BLOCK_N)
    rows = tl.load(neuron_ids_ptr + expert * table_width + columns, mask=columns < width, other=0).to(tl.int64)
    dims = tl.arange(0, BLOCK_K)
    x_ptr = hidden_states_ptr + token_rows[:, None] * hidden_states_stride + dims[None, :]
    gate_ptr = up_weight_ptr + rows.to(tl.int64)[:, None] * hidden_size + dims[None, :]
    up_ptr = gate_ptr + num_neurons.to(tl.int64) * hidden_size
    gate = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in tl.range(0, hidden_size, BLOCK_K, num_stages=STAGES):
        if IS_EVEN:
            x = tl.load(x_ptr + k)
            gate = tl.dot(x, tl.trans(tl.load(gate_ptr + k)), gate, input_precision="ieee")
            if IS_GATED:
                up = tl.dot(x, tl.trans(tl.load(up_ptr + k)), up, input_precision="ieee")
        else:
            is_dim = dims[None, :] < hidden_size - k
            x = tl.load(x_ptr + k, mask=is_dim, other=0.0)
            gate_rows = tl.load(gate_ptr + k, mask=is_dim, other=0.0)
            gate = tl.dot(x, tl.trans(gate_rows), gate, input_precision="ieee")
            if IS_GATED:
                up_rows = tl.load(up_ptr + k, mask=is_dim, other=0.0)
                up = tl.dot(x, tl.trans(up_rows), up, input_precision="ieee")
    if up_bias_ptr is not None:
        gate += tl.load(up_bias_ptr + rows).to(tl.float32)[None, :]
    hidden = activate(gate, ACTIVATION)
    if IS_GATED:
        if up_bias_ptr is not None:
            up += tl.load(up_bias_ptr + num_neurons + rows).to(tl.float32)[None, :]
        hidden *= up
    hidden = tl.where(columns[None, :] < width, hidden, 0.0)
    output_ptr = hidden_ptr + token_rows[:, None] * hidden_stride + columns[None, :]
    tl.store(output_ptr, hidden.to(hidden_ptr.dtype.element_ty), mask=is_token[:, None])


@triton.jit(do_not_specialize=["num_tokens"])
def grouped_down_kernel(
    hidden_ptr,  # [M, H] float, output of grouped_up
    down_weight_ptr,  # [F, D] contiguous, dtype of hidden
    neuron_ids_ptr,  # [N, W] int32, contiguous
    widths_ptr,  # [N] int32
    slots_ptr,  # int32, from group_tokens
    block_experts_ptr,  # int32, from group_tokens
    num_blocks_ptr,  # [1] int32, from group_tokens
    output_ptr,  # out [M, D], dtype of hidden, contiguous: every element is written
    num_tokens,  # M
    hidden_stride,  # H
    hidden_size,  # D
    table_width,  # W
    IS_EVEN: tl.constexpr,  # D is a multiple of BLOCK_N
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (max blocks * ceil(D / BLOCK_N),): BLOCK_M slots of one expert, BLOCK_N output dims.

    Blocks are the fastest dimension: all experts iterate over the neurons of one window of output dims together. Row
    indices are loaded one step before the rows. The loop must carry the loaded value itself: if it carries the cast to
    int64, Triton allocates every buffer of the pipeline and overlaps nothing.
    """
    num_blocks = tl.load(num_blocks_ptr)
    block = tl.program_id(0) % num_blocks
    start = tl.program_id(0) // num_blocks * BLOCK_N
    if start >= hidden_size:
        return
    expert = tl.load(block_experts_ptr + block).to(tl.int64)
    width = tl.load(widths_ptr + expert)
    tokens = tl.load(slots_ptr + block * BLOCK_M + tl.arange(0, BLOCK_M))
    is_token = tokens < num_tokens
    token_rows = tl.where(is_token, tokens, 0).to(tl.int64)
    dims = start + tl.arange(0, BLOCK_N)
    is_dim = dims < hidden_size
    columns = tl.arange(0, BLOCK_K)
    values_ptr = hidden_ptr + token_rows[:, None] * hidden_stride + columns[None, :]
    table_ptr = neuron_ids_ptr + expert * table_width + columns
    weight_ptr = down_weight_ptr + dims[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    rows = tl.load(table_ptr, mask=columns < width, other=0)
    for k in tl.range(0, width, BLOCK_K, num_stages=STAGES):
        values = tl.load(values_ptr + k)
        if IS_EVEN:
            weight = tl.load(weight_ptr + rows.to(tl.int64)[:, None] * hidden_size)
        else:
            weight = tl.load(weight_ptr + rows.to(tl.int64)[:, None] * hidden_size, mask=is_dim[None, :], other=0.0)
        acc = tl.dot(values, weight, acc, input_precision="ieee")
        rows = tl.load(table_ptr + k + BLOCK_K, mask=columns < width - k - BLOCK_K, other=0)
    out_ptr = output_ptr + token_rows[:, None] * hidden_size + dims[None, :]
    tl.store(out_ptr, acc.to(output_ptr.dtype.element_ty), mask=is_token[:, None] & is_dim[None, :])


Groups = tuple[Tensor, Tensor, Tensor]
"""``slots``, ``block_experts`` and ``num_blocks`` of :func:`group_tokens`."""


def group_tokens(expert_ids: Tensor, num_experts: int, block_m: int) -> Groups:
    """Sort the tokens by expert on the device, into buffers of upper-bound size.

    ``expert_ids``: [M] int32 or int64. Returns ``slots`` [B * block_m] int32 (token of each slot, M for padding),
    ``block_experts`` [B] int32 and ``num_blocks`` [1] int32, with B = ceil((M + N (block_m - 1)) / block_m), at
    most M. Entries past ``num_blocks`` are undefined.
    """
    num_tokens = expert_ids.shape[0]
    # A block in use has at least one token, so there are never more blocks than tokens.
    max_blocks = min(triton.cdiv(num_tokens + num_experts * (block_m - 1), block_m), num_tokens)
    slots = expert_ids.new_empty(max_blocks * block_m, dtype=torch.int32)
    block_experts = expert_ids.new_empty(max_blocks, dtype=torch.int32)
    num_blocks = expert_ids.new_empty(1, dtype=torch.int32)
    group_tokens_kernel[(num_experts,)](
        expert_ids,
        slots,
        block_experts,
        num_blocks,
        num_tokens,
        NUM_EXPERTS=num_experts,
        EXPERTS=triton.next_power_of_2(num_experts),
        BLOCK_M=block_m,
        BLOCK=512,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return slots, block_experts, num_blocks


def config_of(weights: ExpertTensors, num_tokens: int) -> GroupedConfig:
    """:func:`grouped_config` for ``num_tokens`` on the device of ``weights``; on others than CUDA that of an A100."""
    up = weights.up
    capability = torch.cuda.get_device_capability(up.device) if up.is_cuda else (8, 0)
    return grouped_config(num_tokens, weights.neuron_ids.shape[0], capability, up.element_size())


def expert_mlp_grouped(
    hidden_states: Tensor, expert_ids: Tensor, weights: ExpertTensors, config: GroupedConfig | None = None
) -> Tensor:
    """The expert MLP of many tokens. Arguments and result: :func:`.dispatch.expert_mlp_cuda`, which checks them.

    ``config``: by default that of :func:`config_of`.
    """
    num_tokens, num_experts = hidden_states.shape[0], weights.neuron_ids.shape[0]
    config = config or config_of(weights, num_tokens)
    assert config.up_block_n % config.down_block_k == 0
    if num_tokens == 0:
        return torch.empty_like(hidden_states)
    groups = group_tokens(expert_ids, num_experts, config.block_m)
    hidden = _grouped_up(hidden_states, groups, weights, config)
    return _grouped_down(hidden, groups, weights, config)


def _grouped_up(hidden_states: Tensor, groups: Groups, weights: ExpertTensors, config: GroupedConfig) -> Tensor:
    """Returns ``hidden`` [M, H] of the dtype of ``hidden_states``."""
    num_tokens, hidden_size = hidden_states.shape
    num_neurons, table_width = weights.down.shape[0], weights.neuron_ids.shape[1]
    num_tiles = triton.cdiv(table_width, config.up_block_n)
    hidden = hidden_states.new_empty((num_tokens, num_tiles * config.up_block_n))
    slots, block_experts, num_blocks = groups
    grouped_up_kernel[(block_experts.shape[0] * num_tiles,)](
        hidden_states,
        weights.up,
        weights.up_bias,
        weights.neuron_ids,
        weights.widths,
        slots,
        block_experts,
        num_blocks,
        hidden,
        num_tokens,
        hidden_states.stride(0),
        hidden_size,
        num_neurons,
        table_width,
        hidden.shape[1],
        ACTIVATION=KERNEL_ACTIVATIONS[weights.activation],
        IS_GATED=weights.up.shape[0] != num_neurons,
        IS_EVEN=hidden_size % config.up_block_k == 0,
        BLOCK_M=config.block_m,
        BLOCK_N=config.up_block_n,
        BLOCK_K=config.up_block_k,
        STAGES=config.up_stages,
        num_warps=config.up_warps,
        enable_fp_fusion=True,
    )
    return hidden


def _grouped_down(hidden: Tensor, groups: Groups, weights: ExpertTensors, config: GroupedConfig) -> Tensor:
    """Returns the output, [M, D] of the dtype of ``hidden``."""
    num_tokens, hidden_size = hidden.shape[0], weights.down.shape[1]
    output = hidden.new_empty((num_tokens, hidden_size))
    slots, block_experts, num_blocks = groups
    grouped_down_kernel[(block_experts.shape[0] * triton.cdiv(hidden_size, config.down_block_n),)](
        hidden,
        weights.down,
        weights.neuron_ids,
        weights.widths,
        slots,
        block_experts,
        num_blocks,
        output,
        num_tokens,
        hidden.shape[1],
        hidden_size,
        weights.neuron_ids.shape[1],
        IS_EVEN=hidden_size % config.down_block_n == 0,
        BLOCK_M=config.block_m,
        BLOCK_N=config.down_block_n,
        BLOCK_K=config.down_block_k,
        STAGES=config.down_stages,
        num_warps=config.down_warps,
        enable_fp_fusion=True,
    )
    return output
