"""Compares the Triton kernels of ``route`` and ``mask_values`` with plain torch once, when a model is loaded on a GPU.

They run in every layout, also before ``tomoe doctor`` has checked anything. A kernel that disagrees or fails is not
used: its op falls back to plain torch, with one warning. The check also compiles both variants of each kernel, for few
and for many tokens, so that no request waits for a compiler.
"""

import logging
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from tomoe_vllm.hf.tomoe_math import value_logits
from tomoe_vllm.kernels.ops import ValueRouter, rejected_kernels
from tomoe_vllm.kernels.route import route_reference
from tomoe_vllm.kernels.value_mask import mask_values_reference

logger = logging.getLogger(__name__)

NEAR_TIE = 1e-3
"""Logits have a standard deviation of about 1. Tokens whose decision is closer than this are not compared: float32 sums
of another order differ by about 1e-6."""

ROUTE_TOKENS, VALUE_TOKENS = (3, 260), (3, 70)
"""One number of tokens for each variant of the kernels: ``MAX_TOKEN_PROGRAMS`` and ``FEW_TOKENS`` lie between."""


def check_on_device(
    routers: Iterable[tuple[int, int]],
    value_routers: Iterable[tuple[int, int, int, int, int]],
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Check the kernels at a model's sizes, on random inputs. Adds an op that fails to ``ops.rejected_kernels``.

    ``routers``: (D, N); ``value_routers``: (D, R, H, A, width), H the heads of this rank; the sizes of all layers,
    each once. ``dtype``: of the hidden states. Takes milliseconds, and seconds where the kernels must be compiled.
    """
    _check("route", _check_route, ROUTE_TOKENS, routers, dtype, device)
    _check("mask_values", _check_value_mask, VALUE_TOKENS, value_routers, dtype, device)


def _check(name: str, check: Callable[..., None], counts: tuple[int, ...], sizes: Iterable[tuple], *where) -> None:
    for size in sorted(set(sizes)):
        try:
            for num_tokens in counts:
                check(num_tokens, *size, *where)
        except Exception as error:  # whatever a compiler, a driver or a comparison raises
            rejected_kernels.add(name)
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            logger.warning("tomoe::%s runs in plain torch on this GPU, which is slower: %s", name, reason)
            return


def _check_route(num_tokens: int, hidden_size: int, num_experts: int, dtype: torch.dtype, device: torch.device) -> None:
    from tomoe_vllm.kernels.route.triton import route_triton

    generator = torch.Generator().manual_seed(0)
    hidden_states = _randn(num_tokens, hidden_size, generator=generator).to(dtype)
    weight = _randn(num_experts, hidden_size, generator=generator) / hidden_size**0.5
    logits = (hidden_states.float() @ weight.T).sort(dim=1, descending=True).values
    is_clear = logits[:, 0] - logits[:, 1] > NEAR_TIE if num_experts > 1 else torch.ones(num_tokens, dtype=torch.bool)
    expected = route_reference(hidden_states, weight)
    hidden_states, weight = hidden_states.to(device), weight.to(device)
    _require_equal(route_triton(hidden_states, weight).cpu(), expected, is_clear)
    if num_experts <= 255:  # with a record it is another binary
        record = torch.full((num_tokens + 1,), 255, dtype=torch.uint8, device=device)
        actual = route_triton(hidden_states, weight, record).cpu()
        _require_equal(actual, expected, is_clear)
        _require_equal(record.cpu().long(), torch.cat([actual, torch.tensor([255])]))


def _check_value_mask(
    num_tokens: int,
    hidden_size: int,
    rank: int,
    num_heads: int,
    head_dim: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    from tomoe_vllm.kernels.value_mask.triton import mask_values_triton

    generator = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        return _randn(*size, generator=generator)

    hidden_states, attention = randn(num_tokens, hidden_size).to(dtype), randn(num_tokens, num_heads * head_dim)
    attention = attention.to(dtype)
    router = ValueRouter(
        down_weight=randn(rank, hidden_size) / hidden_size**0.5,
        down_bias=randn(rank),
        norm_weight=1 + 0.1 * randn(rank),
        norm_bias=0.1 * randn(rank),
        up_weight=randn(head_dim, rank) / rank**0.5,
    )
    on_device = ValueRouter(*(tensor.to(device) for tensor in router))
    actual = mask_values_triton(attention.to(device), hidden_states.to(device), on_device, width).cpu()
    logits = value_logits(hidden_states, *router).sort(dim=1, descending=True).values
    is_clear = torch.ones(num_tokens, dtype=torch.bool)
    if width < head_dim:
        is_clear = logits[:, width - 1] - logits[:, width] > NEAR_TIE
    _require_equal(actual, mask_values_reference(attention, hidden_states, router, width), is_clear)


def _randn(*size: int, generator: torch.Generator) -> Tensor:
    """Normal values in float32: while vLLM loads a model, torch's default dtype is the model's."""
    return torch.randn(*size, generator=generator, dtype=torch.float32, device="cpu")


def _require_equal(actual: Tensor, expected: Tensor, is_compared: Tensor | None = None) -> None:
    is_wrong = (actual != expected).flatten(1).any(dim=1) if actual.dim() > 1 else actual != expected
    if is_compared is not None:
        is_wrong = is_wrong & is_compared
    if is_wrong.any():
        raise ValueError(f"its Triton kernel gives another result for {int(is_wrong.sum())} of {len(actual)} tokens")
