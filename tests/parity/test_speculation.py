"""Speculative decoding (n-grams of the prompt): the tokens of the reference."""

import json

import pytest

from tests.helpers.processes import environment, python
from tests.helpers.tiny_models import VOCAB_SIZE, save_tiny_model
from tests.parity.conftest import Completion, make_prompts, reference_completion

pytestmark = [pytest.mark.engine, pytest.mark.slow]

# In a process of its own: with vLLM 0.32 no second engine starts in a process that has run a speculative one.
GENERATE = """
import json, sys
from pathlib import Path
from tests.parity.conftest import start_engine

speculation = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
with start_engine(Path(sys.argv[1]), speculative_config=speculation) as engine:
    completions = engine.complete(json.loads(sys.argv[2]), prompt_logprobs=None)
Path(sys.argv[3]).write_text(json.dumps([completion.tokens for completion in completions]))
"""


def test_speculated_tokens_equal_those_of_the_reference(tmp_path):
    model, prompts = save_tiny_model(tmp_path / "model", "llama"), make_prompts(VOCAB_SIZE)
    arguments = (tmp_path / "model", json.dumps(prompts), tmp_path / "tokens.json")
    result = python("-c", GENERATE, *arguments, env=environment())
    assert result.returncode == 0, result.stderr[-3000:]
    for prompt, tokens in zip(prompts, json.loads((tmp_path / "tokens.json").read_text()), strict=True):
        assert len(tokens) == 24
        assert reference_completion(model, Completion(prompt, tokens, None)).tokens == tokens
