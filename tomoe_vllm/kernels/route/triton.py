"""``tomoe::route`` on GPUs: the router's logits, their argmax and the record of it in one launch.

Two kernels, of which one runs, by the number of tokens:

    route_token_kernel   one program a token; multiply-adds on the plain cores
    route_tile_kernel    TILE_TOKENS tokens a program; products on the tensor cores (``dot/triton.py``)

Few tokens: each program reads the whole router, 131 KB for N = 8 and D = 4,096. A multiprocessor takes 64 bytes a cycle
from L2, so this is 1.2 us beside a launch of about 2 us. More programs a token would need a second launch to find the
argmax, or atomics on a counter that must be reset. Many tokens: reading the router once a token would be 1.1 GB
of L2 traffic for 8,192 of them; by tiles of 16 tokens it is 67 MB, as much as the hidden states themselves.

Equal logits go to the first expert, and a NaN counts as the largest logit, as in ``torch.argmax``.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tomoe_vllm.kernels.dot.triton import add_product

MAX_TOKEN_PROGRAMS = 256
"""Up to this many tokens one program computes one token: about two of them for each multiprocessor."""

BLOCK_ELEMENTS = 4096
"""Experts x dims of a step of route_token_kernel: 16 KB of weights, four steps in flight."""

TILE_TOKENS, TILE_K = 16, 64


@triton.jit
def first_largest(logits, index, AXIS: tl.constexpr):
    """Index of the first largest logit along ``AXIS``, where NaN is larger than all. ``index``: int32, same shape."""
    is_nan = logits != logits
    logits = tl.where(is_nan, float("-inf"), logits)
    largest = tl.max(logits, axis=AXIS, keep_dims=True)
    any_nan = tl.max(is_nan.to(tl.int32), axis=AXIS, keep_dims=True) != 0
    is_largest = (any_nan & is_nan) | ((any_nan == 0) & (logits == largest))
    return tl.min(tl.where(is_largest, index, 2147483647), axis=AXIS)


@triton.jit(do_not_specialize=["num_tokens"])
def route_token_kernel(
    hidden_states_ptr,  # [T, D] float, rows hidden_states_stride apart
    router_weight_ptr,  # [N, D] float32, contiguous
    expert_ids_ptr,  # out [T] int64
    record_ptr,  # out [at least T] uint8, or None
    hidden_states_stride,
    num_tokens,  # T
    hidden_size,  # D
    num_experts,  # N
    IS_EVEN: tl.constexpr,  # D is a multiple of BLOCK_K
    BLOCK_N: tl.constexpr,  # at least N
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (T,): all logits of one token."""
    token = tl.program_id(0).to(tl.int64)
    experts, dims = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    is_expert = experts < num_experts
    x_ptr = hidden_states_ptr + token * hidden_states_stride + dims
    weight_ptr = router_weight_ptr + experts[:, None] * hidden_size + dims[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for k in tl.range(0, hidden_size, BLOCK_K, num_stages=STAGES):
        if IS_EVEN:
            x = tl.load(x_ptr + k).to(tl.float32)
            weight = tl.load(weight_ptr + k, mask=is_expert[:, None], other=0.0)
        else:
            is_dim = dims < hidden_size - k
            x = tl.load(x_ptr + k, mask=is_dim, other=0.0).to(tl.float32)
            weight = tl.load(weight_ptr + k, mask=is_expert[:, None] & is_dim[None, :], other=0.0)
        acc += weight * x[None, :]
    logits = tl.where(is_expert, tl.sum(acc, axis=1), float("-inf"))
    expert = first_largest(logits, experts, 0)
    tl.store(expert_ids_ptr + token, expert.to(tl.int64))
    if record_ptr is not None:
        tl.store(record_ptr + token, expert.to(tl.uint8))


@triton.jit(do_not_specialize=["num_tokens"])
def route_tile_kernel(
    hidden_states_ptr,  # [T, D] float, rows hidden_states_stride apart
    router_weight_ptr,  # [N, D] float32, contiguous
    expert_ids_ptr,  # out [T] int64
    record_ptr,  # out [at least T] uint8, or None
    hidden_states_stride,
    num_tokens,  # T
    hidden_size,  # D
    num_experts,  # N
    IS_EVEN: tl.constexpr,  # D is a multiple of BLOCK_K
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,  # at least N, and at least 16
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Grid (ceil(T / BLOCK_T),): all logits of BLOCK_T tokens."""
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    experts, dims = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    is_token, is_expert = tokens < num_tokens, experts < num_experts
    x_ptr = hidden_states_ptr + tokens[:, None] * hidden_states_stride + dims[None, :]
    weight_ptr = router_weight_ptr + experts[:, None] * hidden_size + dims[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.float32)
    for k in tl.range(0, hidden_size, BLOCK_K, num_stages=STAGES):
        if IS_EVEN:
            x = tl.load(x_ptr + k, mask=is_token[:, None], other=0.0)
            weight = tl.load(weight_ptr + k, mask=is_expert[:, None], other=0.0)
        else:
            is_dim = (dims < hidden_size - k)[None, :]
            x = tl.load(x_ptr + k, mask=is_token[:, None] & is_dim, other=0.0)
            weight = tl.load(weight_ptr + k, mask=is_expert[:, None] & is_dim, other=0.0)
        acc = add_product(weight, x, acc)
    logits = tl.where(is_expert[:, None], acc, float("-inf"))
    index = experts[:, None] + tl.zeros((BLOCK_N, BLOCK_T), dtype=tl.int32)
    chosen = first_largest(logits, index, 0)
    tl.store(expert_ids_ptr + tokens, chosen.to(tl.int64), mask=is_token)
    if record_ptr is not None:
        tl.store(record_ptr + tokens, chosen.to(tl.uint8), mask=is_token)


def route_triton(hidden_states: Tensor, router_weight: Tensor, record: Tensor | None = None) -> Tensor:
    """See :func:`tomoe_vllm.kernels.route.route`. ``hidden_states`` may have rows of any stride. Captures into a graph.

    Raises ``ValueError`` for a record that is too short, or for more than 255 experts with a record.
    """
    num_tokens, hidden_size = hidden_states.shape
    num_experts = router_weight.shape[0]
    assert hidden_states.stride(1) == 1
    assert router_weight.dtype == torch.float32
    assert router_weight.is_contiguous()
    if record is not None and (record.shape[0] < num_tokens or num_experts > 255):
        raise ValueError(
            f"the record holds {record.shape[0]} tokens and 255 experts; the step has {num_tokens} tokens and "
            f"{num_experts} experts"
        )
    expert_ids = torch.empty(num_tokens, dtype=torch.int64, device=hidden_states.device)
    if num_tokens == 0:
        return expert_ids
    block_n = triton.next_power_of_2(num_experts)
    arguments = (hidden_states, router_weight, expert_ids, record)
    sizes = (hidden_states.stride(0), num_tokens, hidden_size, num_experts)
    if num_tokens <= MAX_TOKEN_PROGRAMS:
        block_k = max(16, BLOCK_ELEMENTS // block_n)
        route_token_kernel[(num_tokens,)](
            *arguments,
            *sizes,
            IS_EVEN=hidden_size % block_k == 0,
            BLOCK_N=block_n,
            BLOCK_K=block_k,
            STAGES=5,
            num_warps=8,
            enable_fp_fusion=True,
        )
    else:
        route_tile_kernel[(triton.cdiv(num_tokens, TILE_TOKENS),)](
            *arguments,
            *sizes,
            IS_EVEN=hidden_size % TILE_K == 0,
            BLOCK_T=TILE_TOKENS,
            BLOCK_N=max(16, block_n),
            BLOCK_K=TILE_K if block_n <= 32 else 32,
            STAGES=4 if block_n <= 32 else 3,
            num_warps=4 if block_n <= 32 else 8,
            enable_fp_fusion=True,
        )
    return expert_ids
