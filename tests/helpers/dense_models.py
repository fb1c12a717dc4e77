"""Tiny random dense models of every family with a word tokenizer, saved as Hugging Face folders.

They have what breaks first: grouped-query attention (4 heads, 2 KV heads), biases, q/k norms, tied and
untied embeddings, and for Phi a partial rotary of 8 of 20 dims (phi-2: 32 of 80).
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi")
BOS, EOS, UNKNOWN = 0, 1, 2
WORDS = [f"w{i}" for i in range(90)]
VOCAB_SIZE = 3 + len(WORDS) + 3  # padded past the tokenizer, as real models are

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
}
_PARTIAL_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4}
_CONFIGS = {
    "llama": (LlamaConfig, {"tie_word_embeddings": True}),
    "mistral": (MistralConfig, {"sliding_window": None, "tie_word_embeddings": False}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"head_dim": 16, "tie_word_embeddings": False}),
    "phi": (PhiConfig, {"hidden_size": 80, "num_key_value_heads": 4, "rope_parameters": _PARTIAL_ROPE}),
}


def dense_config(family: str, **fields):
    """Config of a two-layer dense model; ``fields`` overrides any of it."""
    config_class, own = _CONFIGS[family]
    return config_class(**(_COMMON | own | fields))


def dense_model(family: str, *, seed: int = 0, **fields):
    """Random dense model in float32, eval mode, with weights large enough for masks to matter."""
    model = AutoModelForCausalLM.from_config(dense_config(family, **fields)).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.2 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
            is_norm = "norm" in name.rsplit(".", 2)[-2]
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread + float(is_norm))
    return model


def word_tokenizer(*, adds_bos: bool = True, words=WORDS) -> PreTrainedTokenizerFast:
    """``w0 w1`` -> [BOS,] 3, 4: one token per word, in order."""
    vocabulary = {"<s>": BOS, "</s>": EOS, "<unk>": UNKNOWN} | {word: 3 + i for i, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    if adds_bos:
        tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=256
    )


def save_dense_model(folder: Path, family: str, *, seed: int = 0, max_shard_size: str = "5GB", **fields):
    """Save model and tokenizer in ``folder``; returns the model."""
    model = dense_model(family, seed=seed, **fields)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    word_tokenizer().save_pretrained(folder)
    return model


def random_text(num_words: int, seed: int = 0) -> str:
    """Words in which each follows from the one before it, more or less."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, 8, (num_words,), generator=generator)
    return " ".join(WORDS[i % len(WORDS)] for i in steps.cumsum(0).tolist())
