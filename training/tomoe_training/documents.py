"""Sources of training text: rows of files and data sets as documents.

A source is a local file (.txt, .jsonl, .json, .parquet), a preset of the paper (``wikitext``, ``alpaca``,
``code_alpaca``) or any Hugging Face set (``hf:PATH[:CONFIG]``). A row is a text, a chat (``messages`` or
``conversations``, written with the tokenizer's chat template) or an instruction (in the Alpaca template). Rows without
text are left out.
"""

import hashlib
import json
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

PRESETS = {
    "wikitext": ("Salesforce/wikitext", "wikitext-103-raw-v1"),
    "alpaca": ("tatsu-lab/alpaca", None),
    "code_alpaca": ("sahil2801/CodeAlpaca-20k", None),
}
SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
CHECKED_ROWS = 100
"""Rows that :func:`check_source` reads."""
TEXT_COLUMNS = ("text", "messages", "conversations")
INSTRUCTION_COLUMNS = ("instruction", "output")
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "observation": "tool"}
"""Roles of ShareGPT rows, as chat templates call them."""

_PREAMBLE = "Below is an instruction that describes a task"
_WITH_INPUT = (
    f"{_PREAMBLE}, paired with an input that provides further context. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n{output}"
)
_WITHOUT_INPUT = (
    f"{_PREAMBLE}. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n{output}"
)


# ------------------------------------------------------------------------------------------- one row
def alpaca_text(row: dict) -> str:
    """An instruction row in the Alpaca template; without the input section if ``input`` is empty."""
    fields = {name: row.get(name) or "" for name in ("instruction", "input", "output")}
    for name, value in fields.items():
        if not isinstance(value, str):
            raise ValueError(f"column {name!r} holds {_kind(value)}; text is wanted")
    fields = {name: value.strip() for name, value in fields.items()}
    return (_WITH_INPUT if fields["input"] else _WITHOUT_INPUT).format(**fields)


def chat_text(messages: list, tokenizer) -> str:
    """A chat in the tokenizer's template, without a BOS and EOS at its ends that packing adds.

    Messages have ``role`` and ``content``, or ``from`` and ``value`` (ShareGPT).
    """
    if tokenizer is None or not tokenizer.chat_template:
        raise ValueError("the row is a chat and the tokenizer of the base has no chat template; give text")
    turns = []
    for message in messages:
        if not isinstance(message, dict) or not ("role" in message or "from" in message):
            raise ValueError(f"a message is {_kind(message)}; wanted one with role and content, or from and value")
        role = str(message.get("role") or message.get("from"))
        fields = {key: value for key, value in message.items() if key not in ("from", "value") and value is not None}
        turns.append({"content": message.get("value") or "", **fields, "role": ROLES.get(role, role)})
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except Exception as error:  # a template may raise anything
        raise ValueError(f"the chat template refuses the row: {error}") from error
    if tokenizer.bos_token and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]:
        text = text.removeprefix(tokenizer.bos_token)
    return text.rstrip("\n").removesuffix(tokenizer.eos_token or "")


def row_text(row: Any, text_column: str | None, tokenizer) -> str | None:
    """The text of a row; None for a row without text. Raises ``ValueError`` for a row that holds something else."""
    if isinstance(row, str) and text_column is None:
        return _valid(row)
    if not isinstance(row, dict):
        raise ValueError(f"it holds {_kind(row)}; wanted an object with a text, messages or instruction column")
    known = [name for name in ((text_column,) if text_column else TEXT_COLUMNS) if name in row]
    column = next((name for name in known if row[name] is not None), None)
    if column is None:
        if text_column is None and all(row.get(name) is not None for name in INSTRUCTION_COLUMNS):
            return _valid(alpaca_text(row))
        if known or (text_column is None and all(name in row for name in INSTRUCTION_COLUMNS)):
            return None
        wanted = f"column {text_column!r}" if text_column else "'text' or 'messages' column, nor instruction and output"
        raise ValueError(f"it has no {wanted}; it has: {', '.join(map(str, row))}. Use --text-column")
    value = row[column]
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        return _valid(chat_text(value, tokenizer))
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} holds {_kind(value)}; text is wanted")
    return _valid(value)


def _valid(text: str) -> str:
    """The text with U+FFFD for lone surrogates, which JSON can hold and UTF-8 cannot."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _kind(value: Any) -> str:
    names = {bytes: "bytes", bool: "a boolean", int: "a number", float: "a number", dict: "an object", str: "text"}
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return "nothing" if value is None else names.get(type(value), type(value).__name__)


# ------------------------------------------------------------------------------------------- sources
def load_documents(source: str, text_column: str | None = None, tokenizer=None):
    """A source as a ``datasets.Dataset`` with one column ``text`` and one document per row.

    A .txt file is one document. ``tokenizer`` has the template of chats. Raises ``FileNotFoundError``, or
    ``ValueError`` that names the source, and the row and column that cannot be used.
    """
    import datasets

    datasets.disable_progress_bars()
    if _is_remote(source):
        name, config = PRESETS.get(source) or [*source.removeprefix("hf:").split(":", 1), None][:2]
        rows: Any = datasets.load_dataset(name, config, split="train")
    else:
        rows = Path(source)
        _check_file(source)
    try:
        return datasets.Dataset.from_generator(
            _texts,
            gen_kwargs={"source": source, "rows": rows, "text_column": text_column, "tokenizer": tokenizer},
            features=datasets.Features({"text": datasets.Value("large_string")}),
            fingerprint=_fingerprint(source, rows, text_column, tokenizer),
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, (ValueError, OSError)):
            raise error.__cause__ from None
        raise


def check_source(source: str, text_column: str | None, tokenizer) -> None:
    """Raise the errors of :func:`load_documents` that the first rows of a local file show, within a second."""
    if source != "self" and not _is_remote(source):
        _check_file(source)
        deque(islice(_texts(source, Path(source), text_column, tokenizer), CHECKED_ROWS), maxlen=0)


def _is_remote(source: str) -> bool:
    return source in PRESETS or source.startswith("hf:")


def _check_file(source: str) -> None:
    if Path(source).suffix.lower() not in SUFFIXES:
        raise ValueError(
            f"unknown data source {source!r}: give a {', '.join(SUFFIXES)} file, one of {', '.join(PRESETS)}, "
            "hf:NAME[:CONFIG], or self"
        )
    if not Path(source).is_file():
        raise FileNotFoundError(f"no such data file: {source}")


def _fingerprint(source: str, rows: Any, text_column: str | None, tokenizer) -> str:
    """Names the cached documents of a source: another file content, column or template gives another name."""
    if isinstance(rows, Path):
        stat = rows.stat()
        content = f"{rows.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    else:
        content = rows._fingerprint
    template = tokenizer and [
        str(tokenizer.chat_template),
        tokenizer.bos_token,
        tokenizer.eos_token,
        tokenizer("").input_ids,
    ]
    return hashlib.sha256(json.dumps([1, source, content, text_column, template]).encode()).hexdigest()[:32]


def _texts(source: str, rows: Any, text_column: str | None, tokenizer) -> Iterator[dict[str, str]]:
    """The documents of a source, at least one. Errors name the source and the row."""
    is_empty = True
    for place, row in _rows(source, rows):
        try:
            text = row_text(row, text_column, tokenizer)
        except ValueError as error:
            raise ValueError(f"{source}, {place}: {error}") from error
        if text:
            is_empty = False
            yield {"text": text}
    if is_empty:
        raise ValueError(f"{source} holds no rows with text")


def _rows(source: str, rows: Any) -> Iterator[tuple[str, Any]]:
    """Rows and their place, of a file or a ``datasets.Dataset``."""
    if not isinstance(rows, Path):
        yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
        return
    suffix = rows.suffix.lower()
    if suffix == ".txt":
        text = _decoded(rows.read_bytes(), source)
        yield "text", text.replace("\r\n", "\n").replace("\r", "\n")
    elif suffix == ".parquet":
        yield from _parquet_rows(rows, source)
    elif suffix == ".jsonl":
        yield from _lines(rows, source)
    else:
        try:
            content = json.loads(_decoded(rows.read_bytes(), source))
        except json.JSONDecodeError:
            yield from _lines(rows, source)
            return
        items = content if isinstance(content, list) else [content]
        yield from ((f"row {number}", row) for number, row in enumerate(items, 1))


def _lines(file: Path, source: str) -> Iterator[tuple[str, Any]]:
    with file.open("rb") as stream:
        for number, line in enumerate(stream, 1):
            text = _decoded(line, f"{source}, line {number},")
            if not text.strip():
                continue
            try:
                yield f"line {number}", json.loads(text)
            except json.JSONDecodeError as error:
                raise ValueError(f"{source} cannot be read as {file.suffix[1:]}: line {number}: {error}") from error


def _parquet_rows(file: Path, source: str) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        batches = (row for batch in parquet.ParquetFile(file).iter_batches(1000) for row in batch.to_pylist())
        yield from ((f"row {number}", row) for number, row in enumerate(batches, 1))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{source} cannot be read as parquet: {error}") from error


def _decoded(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8-sig")  # without a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not UTF-8 text: {error.reason} at byte {error.start + 1}; convert it") from error
