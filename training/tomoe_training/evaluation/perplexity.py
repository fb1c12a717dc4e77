"""Perplexity by one fixed protocol.

The whole text is tokenised once, with the special tokens the tokenizer adds by default; it is cut into
non-overlapping blocks of ``block_size`` tokens, the incomplete last one dropped; each block starts
without context, and its first token is not scored. Perplexity = exp(mean negative log-likelihood per
scored token), token level, summed in float64.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tomoe_training.runtime import hide_progress_bars
from tomoe_vllm.hf.register import register_with_transformers


def read_text(file: Path) -> str:
    """A plain text file. Raises ``FileNotFoundError``, or ``ValueError`` if it is not UTF-8, with its name."""
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


@torch.inference_mode()
def negative_log_likelihoods(model, blocks: Tensor) -> Iterator[float]:
    """Summed negative log-likelihood of each block under a Hugging Face causal LM, in nats."""
    for block in blocks:
        ids = block.unsqueeze(0).to(model.device)
        logits = model(ids, use_cache=False).logits[0, :-1]
        yield F.cross_entropy(logits.float(), ids[0, 1:], reduction="sum").item()


def perplexity_from(nlls: list[float], blocks: Tensor) -> float:
    """exp(mean negative log-likelihood) over the scored tokens of the blocks."""
    return math.exp(math.fsum(nlls) / (len(nlls) * (blocks.shape[1] - 1)))


def load_model(folder: Path, dtype: torch.dtype = torch.float32):
    """A dense or ToMoE checkpoint as a Hugging Face model in eval mode."""
    register_with_transformers()
    hide_progress_bars()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def evaluate_perplexity(
    folder: Path,
    text: Path,
    *,
    block_size: int,
    max_blocks: int | None,
    dtype: str,
    score: Callable[[Path, Tensor, str], list[float]] | None = None,
) -> dict:
    """``tomoe eval ppl``: perplexity of a model folder on a text file, JSON-ready.

    ``score`` maps (folder, blocks, dtype) to the summed negative log-likelihood of each block; None runs
    the Hugging Face model. Every scorer sees the same blocks.
    """
    content = read_text(text)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is not a model folder: it has no config.json")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype is {dtype!r}; it must be float32, bfloat16 or float16")
    if block_size < 2:
        raise ValueError(f"block_size is {block_size}; it must be at least 2")
    register_with_transformers()  # or transformers would ask whether to run the checkpoint's own code
    blocks = text_blocks(AutoTokenizer.from_pretrained(folder), content, block_size, max_blocks)
    nlls = (score or score_with_transformers)(folder, blocks, dtype)
    return {
        "ppl": perplexity_from(nlls, blocks),
        "model": str(folder),
        "text": text.name,
        "block_size": block_size,
        "blocks": len(blocks),
        "scored_tokens": len(blocks) * (block_size - 1),
        "dtype": dtype,
    }


def score_with_transformers(folder: Path, blocks: Tensor, dtype: str) -> list[float]:
    """Block scores of the Hugging Face (reference) model."""
    return list(negative_log_likelihoods(load_model(folder, getattr(torch, dtype)), blocks))
