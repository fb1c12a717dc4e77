"""Perplexity by the documented protocol, against a written-out loop in float64."""

import json
import math
import shutil

import pytest
import torch
from tomoe_training.artifacts.export import export_checkpoint
from tomoe_training.evaluation import perplexity
from tomoe_training.evaluation.perplexity import BACKENDS, evaluate_perplexity, text_blocks

from tests.helpers.dense_models import BOS, dense_model, word_tokenizer


def _tokens(text):
    return [BOS, *(3 + int(word[1:]) for word in text.split())]


def _perplexity_by_loop(model, tokens, block_size, max_blocks):
    blocks = [tokens[i : i + block_size] for i in range(0, len(tokens) - block_size + 1, block_size)][:max_blocks]
    nlls = []
    for block in blocks:
        with torch.no_grad():
            log_p = model(torch.tensor([block])).logits[0].double().log_softmax(-1)
        nlls += [-log_p[i, block[i + 1]].item() for i in range(block_size - 1)]
    return math.exp(sum(nlls) / len(nlls)), len(nlls)


@pytest.mark.parametrize(("block_size", "max_blocks"), [(32, 5), (100, 3), (32, None), (2, 10)])
def test_perplexity_follows_the_protocol(block_size, max_blocks, dense_folder, text_file, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(text_file.read_text().split()[:400]))
    expected, num_scored = _perplexity_by_loop(dense_model("llama"), _tokens(text.read_text()), block_size, max_blocks)
    facts = evaluate_perplexity(
        dense_folder(), text, block_size=block_size, max_blocks=max_blocks, dtype="float32"
    )  # fmt: skip
    assert facts["ppl"] == pytest.approx(expected, rel=1e-5)
    assert facts["scored_tokens"] == num_scored


def test_converted_model_is_measured_with_its_gates_on(dense_folder, adapter_folder, text_file, tmp_path):
    export_checkpoint(dense_folder(), adapter_folder(), tmp_path / "out", width_multiple=8, head_dim_multiple=4)
    options = {"block_size": 64, "max_blocks": 4, "dtype": "float32"}
    dense = evaluate_perplexity(dense_folder(), text_file, **options)["ppl"]
    converted = evaluate_perplexity(tmp_path / "out", text_file, **options)["ppl"]
    assert abs(converted / dense - 1) > 0.02


def test_max_blocks_0_means_all_blocks():
    assert len(text_blocks(word_tokenizer(), "w0 " * 99, 10, 0)) == 10


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8'; it must be one of auto, float32, bfloat16, float16"),
        ({"backend": "onnx"}, "backend is 'onnx'; it must be one of hf, vllm"),
        ({"block_size": 1}, "block_size is 1; it must be at least 2"),
        ({"block_size": 100_000}, "the text has 6001 tokens, less than one block of 100000; lower --block-size"),
    ],
)
def test_misuse_is_an_error(fields, message, dense_folder, text_file):
    options = {"block_size": 64, "max_blocks": 4, "dtype": "float32"} | fields
    with pytest.raises(ValueError, match=message):
        evaluate_perplexity(dense_folder(), text_file, **options)


def test_backend_scores_the_same_blocks(dense_folder, text_file, monkeypatch):
    seen = []

    def score(folder, blocks, dtype):
        seen.append((folder, blocks.tolist(), dtype))
        return [63 * math.log(7.0)] * len(blocks)

    monkeypatch.setitem(BACKENDS, "vllm", score)
    options = {"block_size": 64, "max_blocks": 2, "dtype": "bfloat16", "backend": "vllm"}
    facts = evaluate_perplexity(dense_folder(), text_file, **options)
    assert facts["ppl"] == pytest.approx(7.0)
    assert facts["backend"] == "vllm"
    tokens = _tokens(text_file.read_text())
    assert seen == [(dense_folder(), [tokens[:64], tokens[64:128]], "bfloat16")]


def test_text_that_is_not_utf8_is_named(dense_folder, tmp_path):
    (tmp_path / "text.txt").write_bytes(b"w1 \xff w2")
    with pytest.raises(ValueError, match=r"text\.txt is not UTF-8 text"):
        evaluate_perplexity(dense_folder(), tmp_path / "text.txt", block_size=2, max_blocks=1, dtype="float32")


def test_model_is_evaluated_on_the_device_in_its_stored_dtype(dense_folder, text_file, tmp_path, monkeypatch):
    seen = []

    def score(model, blocks):
        seen.append((model.device.type, model.dtype))
        return [1.0] * len(blocks)

    monkeypatch.setattr(perplexity, "negative_log_likelihoods", score)
    options = {"block_size": 64, "max_blocks": 2, "dtype": "auto"}
    assert evaluate_perplexity(dense_folder(), text_file, **options)["dtype"] == "float32"
    monkeypatch.setattr(perplexity, "default_device", lambda: torch.device("meta"))  # stands for "cuda"
    half = shutil.copytree(dense_folder(), tmp_path / "half")
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    assert evaluate_perplexity(half, text_file, **options)["dtype"] == "bfloat16"
    assert seen == [("cpu", torch.float32), ("meta", torch.bfloat16)]
