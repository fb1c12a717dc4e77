"""Two pipeline stages. Compiled, because vLLM's CPU build cannot run stages with --enforce-eager."""

import pytest

from tests.helpers.tiny_models import save_tiny_model
from tests.parity.conftest import max_logprob_difference, reference_completion, start_engine
from tests.parity.test_families import LOGPROB_LIMIT

pytestmark = [pytest.mark.engine, pytest.mark.slow]


def test_two_stages_agree_with_the_reference(tmp_path, prompts, monkeypatch):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    model = save_tiny_model(tmp_path / "model", "llama")  # tied: the last stage has the embeddings too
    with start_engine(tmp_path / "model", pipeline_parallel_size=2, enforce_eager=False) as engine:
        completions = engine.complete(prompts, prompt_logprobs=None)  # not supported by vLLM with stages
    for completion in completions:
        assert reference_completion(model, completion).tokens == completion.tokens
    assert max_logprob_difference(model, completions) < LOGPROB_LIMIT
