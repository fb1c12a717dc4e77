"""Training text: packing of documents, and a stateless order.

Documents are tokenized with the tokenizer's default special tokens (BOS if the family has one), ended by EOS,
joined and cut into blocks of ``sequence_length``. An incomplete last block is dropped. Attention crosses
document borders inside a block. No position is masked: in distillation the student imitates the teacher at
every position.

Sources are interleaved, one block each (1:1:1). The tokens of a block are a pure function of seed and block
number, so the position of a run in its data is its step.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from tomoe_training.seeds import Stream, generator


def pack(documents, tokenizer, sequence_length: int, source: str = "the source"):
    """Blocks of the tokenized documents of ``source``: a ``datasets.Dataset`` of ``input_ids`` [sequence_length].

    Raises ``ValueError`` if it is shorter than one block.
    """
    eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []

    def tokenize(batch: dict) -> dict:
        texts = [text for text in batch["text"] if text]
        return (
            {"input_ids": [ids + eos for ids in tokenizer(texts, verbose=False).input_ids]}
            if texts
            else {"input_ids": []}
        )

    def blocks(batch: dict) -> dict:
        ids = [token for document in batch["input_ids"] for token in document]
        ends = range(sequence_length, len(ids) + 1, sequence_length)
        return {"input_ids": [ids[end - sequence_length : end] for end in ends]}

    tokens = documents.map(tokenize, batched=True, remove_columns=documents.column_names)
    # One incomplete block is dropped per batch: a large batch loses little text.
    packed = tokens.map(blocks, batched=True, batch_size=10_000)
    if len(packed) == 0:
        found = sum(map(len, tokens["input_ids"])) if len(tokens) else 0
        raise ValueError(
            f"{source} is shorter than one block of {sequence_length} tokens (it has {found}); lower sequence_length"
            " or give more text"
        )
    return packed.with_format("torch")


class InterleavedBlocks:
    """Interleaved blocks of several sources, reshuffled every epoch: a pure function of seed and block number."""

    def __init__(self, sources: Sequence[Sequence], seed: int):
        self.sources, self.seed = list(sources), seed
        self._orders: dict[int, tuple[int, list[int]]] = {}

    def block(self, number: int) -> Tensor:
        """Tokens of block ``number`` >= 0: [sequence_length] int64."""
        source = number % len(self.sources)
        rows = self.sources[source]
        epoch, position = divmod(number // len(self.sources), len(rows))
        row = rows[self._order(source, epoch, len(rows))[position]]
        return row["input_ids"] if isinstance(row, dict) else row

    def batch(self, step: int, rows: range, batch_size: int) -> Tensor:
        """Rows of the global batch of ``batch_size`` sequences at ``step``: [len(rows), sequence_length]."""
        return torch.stack([self.block(step * batch_size + row) for row in rows])

    def _order(self, source: int, epoch: int, length: int) -> list[int]:
        known = self._orders.get(source)
        if known is None or known[0] != epoch:
            random = generator(self.seed, Stream.DATA_ORDER, source, epoch)
            known = (epoch, random.permutation(length).tolist())
            self._orders[source] = known
        return known[1]


def micro_batches(batch_size: int, micro_batch_size: int | None, rank: int, num_ranks: int) -> list[range]:
    """Rows of the global batch that process ``rank`` gets, in the parts that go through the model at once.

    A micro-batch has the same rows for every number of processes, unless ``micro_batch_size`` is None: then it is
    all that the process gets. Raises ``ValueError`` if the batch cannot be divided.
    """
    step = num_ranks * (micro_batch_size or 1)
    if batch_size % step:
        parts = f"micro-batches of {micro_batch_size}" if micro_batch_size else "whole sequences"
        fitting = [n for n in range(1, batch_size + 1) if batch_size % (n * (micro_batch_size or 1)) == 0]
        processes = f"use {', '.join(map(str, fitting))} processes or " if fitting else ""
        raise ValueError(
            f"batch_size {batch_size} does not divide into {parts} on {num_ranks} processes; {processes}set batch_size "
            f"to a multiple of {step}"
        )
    local = batch_size // num_ranks
    micro = micro_batch_size or local
    return [range(i, i + micro) for i in range(rank * local, (rank + 1) * local, micro)]


@torch.no_grad()
def sample_from_model(
    model, tokenizer, *, num_tokens: int, length: int, seed: int, batch_size: int = 16, is_sharded: bool = False
) -> list[str]:
    """Text sampled from the dense model at temperature 1, starting with its BOS (or EOS) token.

    Self-distillation on it needs no data. Returns documents with about ``num_tokens`` tokens in total. All processes
    must call it for a sharded model; rounding may give them other texts.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise ValueError("the tokenizer has neither a BOS nor an EOS token to start sampling from; give data files")
    texts: list[str] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for _ in range(-(-num_tokens // (batch_size * length))):
            ids = torch.full((batch_size, 1), start, device=model.device)
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0, temperature=1.0,
                max_new_tokens=length, pad_token_id=tokenizer.pad_token_id or start, synced_gpus=is_sharded,
            )  # fmt: skip
            texts += tokenizer.batch_decode(out, skip_special_tokens=True)
    return [text for text in texts if text.strip()]
