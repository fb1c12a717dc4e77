"""vLLM without a server: scoring blocks of tokens."""

import math
import os
from pathlib import Path

from torch import Tensor
from vllm import LLM, SamplingParams


def score_with_vllm(folder: Path, blocks: Tensor, dtype: str) -> list[float]:
    """Summed negative log-likelihood of each block [num_blocks, block_size] under vLLM, in nats."""
    # On CPUs vLLM would take nearly all memory for its KV cache; this is plenty for a few blocks at a time.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    llm = LLM(str(folder), dtype=dtype, enforce_eager=True, max_model_len=blocks.shape[1] + 1, trust_remote_code=True)
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    outputs = llm.generate([{"prompt_token_ids": block.tolist()} for block in blocks], params, use_tqdm=False)
    scores = []
    for output in outputs:
        ids = output.prompt_token_ids
        # Position 0 has no logprob: nothing precedes it.
        logprobs = zip(ids[1:], output.prompt_logprobs[1:], strict=True)
        scores.append(-math.fsum(entry[token].logprob for token, entry in logprobs))
    return scores
