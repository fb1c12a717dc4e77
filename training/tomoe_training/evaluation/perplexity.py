"""``tomoe eval ppl``: perplexity of a model folder on a text file, by one fixed protocol.

The whole text is tokenized once, with the special tokens the tokenizer adds by default. It is cut into
non-overlapping blocks of ``block_size`` tokens; an incomplete last block is dropped. Each block starts
without context, and its first token is not scored. Perplexity = exp(mean negative log-likelihood per
scored token), token level, summed in float64. All backends score the same blocks.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tomoe_training.artifacts.model_check import check_model
from tomoe_training.artifacts.tokenizer_files import load_tokenizer
from tomoe_training.dtypes import EVALUATION_DTYPES, default_device, evaluation_dtype
from tomoe_training.process_setup import hide_progress_bars
from tomoe_vllm.hf.register import register_with_transformers


def evaluate_perplexity(
    folder: Path, text: Path, *, backend: str = "hf", block_size: int, max_blocks: int | None, dtype: str
) -> dict:
    """Perplexity of a dense model or a checkpoint on a text file, JSON-ready.

    ``backend`` is ``hf`` (the reference model) or ``vllm``; both run on the GPU if there is one. ``dtype`` ``auto`` is
    the stored dtype there, and float32 on CPUs. Raises ``FileNotFoundError`` and ``ValueError``
    for bad input, before the model is loaded.
    """
    content = read_text(text)
    check_model(folder, may_be_quantized=backend == "vllm")
    for option, value, allowed in (("backend", backend, BACKENDS), ("dtype", dtype, EVALUATION_DTYPES)):
        if value not in allowed:
            raise ValueError(f"{option} is {value!r}; it must be one of {', '.join(allowed)}")
    if block_size < 2:
        raise ValueError(f"block_size is {block_size}; it must be at least 2")
    register_with_transformers()  # otherwise transformers would ask whether to trust the checkpoint's own code
    dtype = evaluation_dtype(dtype, AutoConfig.from_pretrained(folder).dtype, default_device())
    blocks = text_blocks(load_tokenizer(folder), content, block_size, max_blocks)
    nlls = BACKENDS[backend](folder, blocks, dtype)
    return {
        "ppl": perplexity_from(nlls, blocks),
        "model": str(folder),
        "text": text.name,
        "block_size": block_size,
        "blocks": len(blocks),
        "scored_tokens": len(blocks) * (block_size - 1),
        "dtype": dtype,
        "backend": backend,
    }


def read_text(file: Path) -> str:
    """Content of a plain text file. Raises ``FileNotFoundError``, or ``ValueError`` if it is not UTF-8."""
    if not file.is_file():
        raise FileNotFoundError(f"no such text file: {file}")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from error


def text_blocks(tokenizer, text: str, block_size: int, max_blocks: int | None) -> Tensor:
    """Token blocks of a text: [num_blocks, block_size] int64.

    Raises ``ValueError`` if the text is shorter than one block.
    """
    ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    num_blocks = len(ids) // block_size
    if num_blocks == 0:
        raise ValueError(f"the text has {len(ids)} tokens, less than one block of {block_size}; lower --block-size")
    blocks = ids[: num_blocks * block_size].view(num_blocks, block_size)
    return blocks[:max_blocks] if max_blocks else blocks


def perplexity_from(nlls: list[float], blocks: Tensor) -> float:
    """exp(mean negative log-likelihood) over the scored tokens of the blocks."""
    return math.exp(math.fsum(nlls) / (len(nlls) * (blocks.shape[1] - 1)))


# ------------------------------------------------------------------------------------------- backends
def load_model(folder: Path, dtype: torch.dtype = torch.float32):
    """A dense or ToMoE checkpoint as a Hugging Face model in eval mode."""
    register_with_transformers()
    hide_progress_bars()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.inference_mode()
def negative_log_likelihoods(model, blocks: Tensor) -> Iterator[float]:
    """Summed negative log-likelihood of each block under a Hugging Face causal LM, in nats."""
    for block in blocks:
        ids = block.unsqueeze(0).to(model.device)
        logits = model(ids, use_cache=False).logits[0, :-1]
        yield F.cross_entropy(logits.float(), ids[0, 1:], reduction="sum").item()


def score_with_transformers(folder: Path, blocks: Tensor, dtype: str) -> list[float]:
    """Summed negative log-likelihood of each block [num_blocks, block_size] under the reference model, in nats."""
    model = load_model(folder, getattr(torch, dtype)).to(default_device())
    return list(negative_log_likelihoods(model, blocks))


def score_with_vllm(folder: Path, blocks: Tensor, dtype: str) -> list[float]:
    """Summed negative log-likelihood of each block [num_blocks, block_size] under vLLM, in nats."""
    from vllm import LLM, SamplingParams  # tomoe_training works where vLLM is not installed

    # By default vLLM reserves nearly all memory of a CPU for its KV cache; this is enough for a few blocks.
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    llm = LLM(str(folder), dtype=dtype, enforce_eager=True, max_model_len=blocks.shape[1] + 1, trust_remote_code=True)
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    try:
        outputs = llm.generate([{"prompt_token_ids": block.tolist()} for block in blocks], params, use_tqdm=False)
    finally:
        # An engine process that outlives this one keeps its standard output open, and a caller that reads it waits.
        llm.llm_engine.engine_core.shutdown()
    scores = []
    for output in outputs:
        ids = output.prompt_token_ids
        # Position 0 has no logprob: nothing precedes it.
        logprobs = zip(ids[1:], output.prompt_logprobs[1:], strict=True)
        scores.append(-math.fsum(entry[token].logprob for token, entry in logprobs))
    return scores


BACKENDS = {"hf": score_with_transformers, "vllm": score_with_vllm}
