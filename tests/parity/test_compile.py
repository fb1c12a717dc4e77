"""torch.compile, as vLLM runs it without --enforce-eager: the same tokens as the reference."""

import pytest

from tests.helpers.tiny_models import save_tiny_model
from tests.parity.conftest import max_logprob_difference, reference_completion, start_engine
from tests.parity.test_families import LOGPROB_LIMIT

pytestmark = [pytest.mark.engine, pytest.mark.slow]

TWO_LAYERS = {
    "num_hidden_layers": 2,
    "expert_intermediate_sizes": [32, 64],
    "qk_head_dims": [16, 24],
    "vo_head_dims": [16, 7],
}


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_compiled_model_agrees_with_the_reference(tmp_path, prompts, monkeypatch, family):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))  # compile, do not load what an earlier run left
    model = save_tiny_model(tmp_path / "model", family, **TWO_LAYERS)
    with start_engine(tmp_path / "model", enforce_eager=False) as engine:
        completions = engine.complete(prompts)
    for completion in completions:
        assert reference_completion(model, completion).tokens == completion.tokens
    assert max_logprob_difference(model, completions) < LOGPROB_LIMIT
