"""SmolLM2-135M with the shipped adapter through the real commands: export, and both backends."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.demo_model import ADAPTER, save_demo_base, save_demo_checkpoint, tomoe
from tests.helpers.processes import REPOSITORY
from tests.parity.conftest import logprob_differences, reference_completion, start_engine

NUM_TOKENS = 48
LOGPROB_LIMIT = 1e-3

pytestmark = [pytest.mark.slow, pytest.mark.engine]

PROMPTS = [
    "The import statement searches for the named module",
    "Water boils at",
    "def fibonacci(n):\n    ",
    "Once upon a time there was a king who",
    "The European lobster is",
    "In 1969 the first",
    "Dear Sir or Madam,",
    "2 + 2 = 4, 3 + 3 =",
    "The three primary colours are",
    "SELECT name FROM users WHERE",
    "A",
    "Q: Who wrote Hamlet?\nA:",
    "To make an omelette, first",
    "The quick brown fox jumps over the lazy dog. " * 6,
    "Photosynthesis is the process by which",
    "<html>\n<head>",
]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_demo_base(tmp_path_factory.mktemp("base") / "smollm2")


@pytest.fixture(scope="module")
def checkpoint(base, tmp_path_factory) -> Path:
    return save_demo_checkpoint(tmp_path_factory.mktemp("checkpoint") / "smollm2-tomoe", base)


@pytest.fixture(scope="module")
def reference(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True, dtype=torch.float32)
    return model.eval()


@pytest.fixture(scope="module")
def prompts(checkpoint) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return [tokenizer(prompt).input_ids for prompt in PROMPTS]


@pytest.fixture(scope="module")
def completions(checkpoint, prompts):
    with start_engine(checkpoint, num_gpu_blocks_override=128) as engine:
        batch = engine.complete(prompts, num_tokens=NUM_TOKENS)
        alone = [engine.complete([prompt], num_tokens=NUM_TOKENS)[0] for prompt in prompts[:4]]
    return batch, alone


def test_inspect_shows_a_ratio_at_the_budget_and_not_over(base, tmp_path):
    tomoe("export", "--base", base, "--adapter", ADAPTER, "--out", tmp_path / "half", "--active-ratio", 0.5)
    assert 0.49 <= tomoe("inspect", tmp_path / "half")["active_ratio"] <= 0.5


def test_reference_and_engine_give_the_same_tokens(reference, completions):
    assert len(completions[0]) == 16
    for completion in completions[0]:
        assert len(completion.tokens) == NUM_TOKENS
        assert reference_completion(reference, completion).tokens == completion.tokens


def test_reference_and_engine_agree_on_logprobs_of_prompts(reference, completions):
    for completion in completions[0]:
        if (num_scored := len(completion.prompt) - 1) > 0:
            assert logprob_differences(reference, completion)[:num_scored].max() < LOGPROB_LIMIT


def test_a_prompt_gives_the_same_tokens_alone_and_in_a_batch_of_16(completions):
    batch, alone = completions
    assert [c.tokens for c in alone] == [c.tokens for c in batch[:4]]


def test_three_ranks_give_the_tokens_of_one(checkpoint, prompts, completions):
    with start_engine(checkpoint, num_gpu_blocks_override=128, tensor_parallel_size=3) as engine:
        sharded = engine.complete(prompts, num_tokens=NUM_TOKENS)
    assert [c.tokens for c in sharded] == [c.tokens for c in completions[0]]


def test_perplexity_is_the_same_on_both_backends(checkpoint, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text((REPOSITORY / "docs" / "method.md").read_text())
    options = ("--model", checkpoint, "--text", text, "--block-size", 256, "--max-blocks", 4)
    hf, vllm = (tomoe("eval", "ppl", *options, "--backend", backend)["ppl"] for backend in ("hf", "vllm"))
    assert hf == pytest.approx(vllm, rel=1e-3)
