"""Tokenizers of model folders: loading with clear errors, and a checkpoint's tokenizer that equals its base's.

transformers chooses the class of a tokenizer by the model type, by rules that do not know ToMoE model types. The same
files may therefore give other tokens in the exported folder, so the class that was really loaded is written there, and
both tokenizers are compared on probe texts.
"""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from tomoe_vllm.hf.register import register_with_transformers

FILES = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model", "*.tiktoken",
    "tekken.json", "chat_template.jinja", "chat_template.json", "additional_chat_templates",
)  # fmt: skip
VOCABULARIES = ("tokenizer.json", "tokenizer*.model", "spiece.model", "*.tiktoken", "tekken.json", "vocab*")
"""A tokenizer needs one of these."""

TEXTS = (
    "we need to add nine and six", "The quick brown fox, 2023-11-28: 1234567 + 3.14 = ?", " leading", "trailing ",
    "two  spaces   three", "\n", "line\nline\n\n\nthird\r\n\tindented", "def f(x):\n    return x[0] != '\\n'  # it's",
    "naïve Füße 中文字 日本語 привет 🙂🏽", "ＦＵＬＬ width ﬁ e\u0301", "w1 w2 w3", "",
)  # fmt: skip
"""Spaces, digits, newlines, code, other scripts, and what normalizers change."""
CHAT = [{"role": "user", "content": " Add 9\nand 6. "}, {"role": "assistant", "content": "15"}]

logger = logging.getLogger(__name__)


def load_tokenizer(folder: Path, *, warns: bool = False) -> Any:
    """The tokenizer of a model folder, as transformers chooses it.

    With ``warns`` a warning says where it differs from ``tokenizer.json``. Raises ``ValueError`` for a folder without a
    tokenizer, with a damaged one, and with one that needs its own code.
    """
    register_with_transformers()
    if not any(next(folder.glob(pattern), None) for pattern in VOCABULARIES):
        raise ValueError(f"{folder} has no tokenizer: add tokenizer.json, or tokenizer.model, of the model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises nothing more precise for a damaged file
        raise ValueError(f"the tokenizer of {folder} cannot be loaded: {error or type(error).__name__}") from error
    if warns and (difference := _difference_from_json(tokenizer, folder)):
        logger.warning("%s", difference)
    return tokenizer


def check_vocabulary(tokenizer, vocab_size: int, folder: Path) -> None:
    """Raise ``ValueError`` if the tokenizer has more tokens than the model."""
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens, the model {vocab_size}: they do not belong "
            "together"
        )


def copy_tokenizer(base: Path, folder: Path) -> None:
    """Write the tokenizer of ``base`` to the checkpoint ``folder``, which has a config.json.

    A base without a tokenizer gives a checkpoint without one. Raises ``ValueError`` if the checkpoint would give other
    tokens than the base.
    """
    for pattern in FILES:
        for file in base.glob(pattern):
            if file.is_dir():
                shutil.copytree(file, folder / file.name)
            else:
                shutil.copyfile(file, folder / file.name)
    if not any(next(base.glob(pattern), None) for pattern in VOCABULARIES):
        return
    tokenizer = load_tokenizer(base)
    for mend in (_write_class, lambda tokenizer, folder: tokenizer.save_pretrained(folder)):
        copy = load_tokenizer(folder)
        if type(copy) is type(tokenizer) and first_difference(tokenizer, copy) is None:
            return
        mend(tokenizer, folder)
    difference = first_difference(tokenizer, load_tokenizer(folder))
    if difference is not None:
        raise ValueError(
            f"the tokenizer of {base} cannot be exported: the checkpoint would read {difference}. Save it anew with "
            "AutoTokenizer.from_pretrained(base).save_pretrained(base)"
        )


def _write_class(tokenizer, folder: Path) -> None:
    """Name the class of ``tokenizer`` in tokenizer_config.json, which decides for an unknown model type."""
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    config.pop("auto_map", None)
    config["tokenizer_class"] = type(tokenizer).__name__
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def first_difference(tokenizer, other) -> str | None:
    """A text that two tokenizers read differently, with both results; None if all probe texts are equal."""
    if tokenizer.chat_template != other.chat_template:
        return "another chat template"
    for text in _probe_texts(tokenizer):
        for adds_special in (False, True):
            first, second = (_ids(t, text, adds_special) for t in (tokenizer, other))
            if first != second:
                return f"{text!r} as {_some(second)} instead of {_some(first)}"
        if tokenizer.decode(first) != other.decode(first):
            return f"the tokens of {text!r} back as {other.decode(first)!r} instead of {tokenizer.decode(first)!r}"
    return None


def _probe_texts(tokenizer) -> Iterator[str]:
    yield from TEXTS
    special = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    for token in sorted(special)[:100]:
        yield f"{token}we need{token} to add {token}\nnine"
    if tokenizer.chat_template:
        try:
            yield tokenizer.apply_chat_template(CHAT, tokenize=False)
        except Exception:  # a template may refuse this chat, and raise anything; the templates are compared as texts
            return


def _ids(tokenizer, text: str, adds_special: bool) -> list[int]:
    return tokenizer(text, add_special_tokens=adds_special, verbose=False).input_ids


def _difference_from_json(tokenizer, folder: Path) -> str | None:
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    raw = Tokenizer.from_file(str(file))
    raw.no_padding()
    raw.no_truncation()
    for text in TEXTS:
        ids, stored = _ids(tokenizer, text, False), raw.encode(text, add_special_tokens=False).ids
        if ids != stored:
            return (
                f"{type(tokenizer).__name__} of transformers reads {text!r} as {_some(ids)} ({tokenizer.decode(ids)!r})"
                f", and {file} says {_some(stored)} ({raw.decode(stored)!r}). The former is trained and served; "
                'if the file is right, set "tokenizer_class": "PreTrainedTokenizerFast" in tokenizer_config.json'
            )
    return None


def _some(ids: list[int], limit: int = 12) -> str:
    return f"[{', '.join(map(str, ids[:limit]))}{', ...' if len(ids) > limit else ''}]"
