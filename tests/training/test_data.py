"""Training text: packing and a stateless order."""

from collections import Counter

import pytest
import torch
from tomoe_training.data import InterleavedBlocks, micro_batches, pack, sample_from_model

from tests.helpers.dense_models import BOS, EOS, UNKNOWN, dense_model, word_tokenizer


# ------------------------------------------------------------------------------------------ packing
def _documents(texts):
    import datasets

    return datasets.Dataset.from_dict({"text": texts})


def _packed(texts, length, **tokenizer):
    return [row["input_ids"].tolist() for row in pack(_documents(texts), word_tokenizer(**tokenizer), length)]


def test_documents_are_joined_between_bos_and_eos():
    assert _packed(["w0 w1 w2", "w3", "w4 w5"], 4) == [[BOS, 3, 4, 5], [EOS, BOS, 6, EOS], [BOS, 7, 8, EOS]]


def test_no_bos_where_the_tokenizer_adds_none():
    assert _packed(["w0 w1 w2", "w3"], 3, adds_bos=False) == [[3, 4, 5], [EOS, 6, EOS]]


def test_only_the_incomplete_last_block_is_dropped():
    texts = [" ".join(f"w{(i * 7 + j) % 90}" for j in range(i % 13)) for i in range(200)]  # some are empty
    stream = [t for text in texts if text for t in [BOS, *(3 + int(w[1:]) for w in text.split()), EOS]]
    blocks = _packed(texts, 16)
    assert [t for block in blocks for t in block] == stream[: len(stream) // 16 * 16]


def test_unknown_words_become_the_unknown_token():
    assert _packed(["w0 nonsense w1"], 5) == [[BOS, 3, UNKNOWN, 4, EOS]]


@pytest.mark.parametrize("texts", [["w0 w1"], [""], []])
def test_source_shorter_than_one_block_is_an_error(texts):
    with pytest.raises(ValueError, match=r"the source is shorter than one block of 16 tokens \(it has \d\); lower"):
        _packed(texts, 16)


# -------------------------------------------------------------------------------------------- order
def _sources(*lengths):
    return [[torch.tensor([100 * i + j]) for j in range(length)] for i, length in enumerate(lengths)]


def _numbers(blocks, count, start=0):
    return [blocks.block(i).item() for i in range(start, start + count)]


def test_sources_are_interleaved():
    blocks = InterleavedBlocks(_sources(5, 3, 8), seed=0)
    assert [n // 100 for n in _numbers(blocks, 30)] == [0, 1, 2] * 10


def test_every_block_occurs_once_per_epoch_in_a_new_order():
    blocks = InterleavedBlocks(_sources(20, 7), seed=0)
    first = _numbers(blocks, 200)[::2]
    epochs = [first[i : i + 20] for i in range(0, 100, 20)]
    assert all(Counter(epoch) == Counter(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    assert epochs[0] != list(range(20))


def test_order_is_a_pure_function_of_the_seed():
    forwards = _numbers(InterleavedBlocks(_sources(9, 4), seed=3), 60)
    blocks = InterleavedBlocks(_sources(9, 4), seed=3)
    backwards = [blocks.block(i).item() for i in reversed(range(60))]
    assert backwards[::-1] == forwards
    assert _numbers(InterleavedBlocks(_sources(9, 4), seed=4), 60) != forwards


def test_batches_are_the_blocks_in_order_however_rows_are_split():
    blocks = InterleavedBlocks(_sources(9, 4), seed=3)
    whole = blocks.batch(5, range(4), 4)
    assert whole.flatten().tolist() == _numbers(blocks, 4, start=20)
    parts = [blocks.batch(5, rows, 4) for rows in (range(2), range(2, 3), range(3, 4))]
    assert torch.equal(torch.cat(parts), whole)


# ------------------------------------------------------------------------------------- self-made text
def test_sampling_text_does_not_change_the_random_state():
    model, tokenizer = dense_model("llama"), word_tokenizer()
    torch.manual_seed(9)
    expected = torch.rand(3)
    torch.manual_seed(9)
    texts = sample_from_model(model, tokenizer, num_tokens=64, length=16, seed=1, batch_size=4)
    assert torch.equal(torch.rand(3), expected)
    assert len(texts) == 4
    assert all(word.startswith("w") for text in texts for word in text.split())
    assert texts == sample_from_model(model, tokenizer, num_tokens=64, length=16, seed=1, batch_size=4)
    assert texts != sample_from_model(model, tokenizer, num_tokens=64, length=16, seed=2, batch_size=4)


# ------------------------------------------------------------------------------------ division of a batch
def test_batch_is_divided_over_processes_and_passes():
    assert micro_batches(4, None, 0, 1) == [range(4)]
    assert micro_batches(4, None, 1, 2) == [range(2, 4)]
    assert micro_batches(8, 2, 1, 2) == [range(4, 6), range(6, 8)]


def test_batch_that_cannot_be_divided_names_what_fits():
    with pytest.raises(ValueError, match=r"batch_size 2 does not divide into whole sequences on 8 processes; use 1, 2"):
        micro_batches(2, None, 0, 8)
    with pytest.raises(ValueError, match=r"micro-batches of 2 on 3 processes; use 1, 2, 4 processes or set .* of 6"):
        micro_batches(8, 2, 0, 3)
