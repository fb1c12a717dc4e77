"""vLLM's TRITON_ATTN_DIFFKV with values wider than keys, as ``kv_layout: diffkv`` uses it and no model of vLLM does.

Its cache write and attention kernel against plain torch, through a paged cache. This checks values only, not that it
compiles or is fast on a GPU.
"""

import pytest
import torch
import triton
import triton.language as tl
import vllm.triton_utils

from tests.helpers.compare import assert_close, is_close

# Without a GPU vLLM replaces Triton by a placeholder in its own modules; the interpreter needs no GPU.
vllm.triton_utils.triton, vllm.triton_utils.tl = triton, tl

from vllm.v1.attention.ops.triton_reshape_and_cache_flash import (  # noqa: E402
    triton_reshape_and_cache_flash_diffkv as write_cache,
)
from vllm.v1.attention.ops.triton_unified_attention_diffkv import unified_attention_diffkv  # noqa: E402

BLOCK_SIZE, NUM_BLOCKS, NUM_SEGMENTS = 16, 12, 4
PREFILL, DECODE = [(20, 20), (7, 33), (1, 18)], [(1, 20), (1, 33), (1, 1)]
"""New tokens and context length of each sequence."""


SCALE = 64**-0.5


def run(query_key: int, kept: int, value: int, sequences, *, is_split: bool, kernel_scale: float = SCALE):
    """Output of the kernel and of plain torch: [tokens, heads, value]. Dims past ``kept`` are zero padding."""
    num_heads, num_kv_heads = 4, 2
    generator = torch.Generator().manual_seed(0)

    def heads(num_tokens: int, num: int, width: int, size: int) -> torch.Tensor:
        random = torch.randn(num_tokens, num, width, generator=generator)
        return torch.nn.functional.pad(random, (0, size - width))

    cache = torch.zeros(NUM_BLOCKS, num_kv_heads, BLOCK_SIZE, query_key + value)
    blocks = torch.randperm(NUM_BLOCKS, generator=generator).to(torch.int32)
    tables = torch.zeros(len(sequences), 3, dtype=torch.int32)
    queries, expected, used = [], [], 0
    for i, (num_new, length) in enumerate(sequences):
        num = -(-length // BLOCK_SIZE)
        tables[i, :num] = blocks[used : used + num]
        used += num
        q = heads(num_new, num_heads, kept, query_key)
        k, v = heads(length, num_kv_heads, kept, query_key), heads(length, num_kv_heads, value, value)
        positions = torch.arange(length)
        slots = tables[i, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
        one = torch.ones(1)
        write_cache(k, v, cache.transpose(1, 2), slots, "auto", one, one)
        k, v = (x.repeat_interleave(num_heads // num_kv_heads, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * SCALE
        is_later = positions[None] > torch.arange(length - num_new, length)[:, None]
        weights = scores.masked_fill(is_later, float("-inf")).softmax(-1)
        expected.append(torch.einsum("hqk,khd->qhd", weights, v))
        queries.append(q)
    q, packed = torch.cat(queries), cache.transpose(1, 2)
    output = torch.full((len(q), num_heads, value), float("nan"))
    starts = torch.tensor([0, *[num_new for num_new, _ in sequences]]).cumsum(0).to(torch.int32)
    partials = {}
    if is_split:
        padded = triton.next_power_of_2(value)
        partials = {
            "seq_threshold_3D": 8,
            "num_par_softmax_segments": NUM_SEGMENTS,
            "softmax_segm_output": torch.empty(len(q), num_heads, NUM_SEGMENTS, padded),
            "softmax_segm_max": torch.empty(len(q), num_heads, NUM_SEGMENTS),
            "softmax_segm_expsum": torch.empty(len(q), num_heads, NUM_SEGMENTS),
        }
    unified_attention_diffkv(
        q=q,
        k=packed[..., :query_key],
        v=packed[..., query_key:],
        out=output,
        cu_seqlens_q=starts,
        seqused_k=torch.tensor([length for _, length in sequences], dtype=torch.int32),
        softmax_scale=kernel_scale,
        causal=True,
        window_size=(-1, -1),
        block_table=tables,
        softcap=0,
        max_seqlen_q=max(num_new for num_new, _ in sequences),
        **partials,
    )
    return output, torch.cat(expected)


@pytest.mark.parametrize(
    ("query_key", "kept", "value"),
    [
        pytest.param(32, 20, 64, id="keys of half a head, padded from 20"),
        pytest.param(48, 48, 64, id="not a power of two"),
        pytest.param(80, 74, 128, id="head_dim 128"),
        pytest.param(64, 64, 24, id="static values narrower than keys"),
    ],
)
@pytest.mark.parametrize(
    ("sequences", "is_split"),
    [
        pytest.param(PREFILL, False, id="prefill, chunk and decode"),
        pytest.param(DECODE, False, id="decode"),
        pytest.param(DECODE, True, id="decode, split over the context"),
    ],
)
def test_values_and_keys_of_different_widths(query_key, kept, value, sequences, is_split):
    assert_close(*run(query_key, kept, value, sequences, is_split=is_split))


def test_tolerance_catches_the_scale_of_the_pruned_head():
    assert is_close(*run(48, 48, 64, DECODE, is_split=False))
    assert not is_close(*run(48, 48, 64, DECODE, is_split=False, kernel_scale=48**-0.5))
