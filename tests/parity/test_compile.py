"""With torch.compile (vLLM without --enforce-eager) the tokens equal those of the reference."""

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


def check_compiled(folder, prompts, family, **fields):
    model = save_tiny_model(folder, family, **(TWO_LAYERS | fields))
    with start_engine(folder, enforce_eager=False) as engine:
        completions = engine.complete(prompts)
    for completion in completions:
        assert reference_completion(model, completion).tokens == completion.tokens
    assert max_logprob_difference(model, completions) < LOGPROB_LIMIT


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    """Use an empty compile cache."""
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))


def test_compiled_model_without_gate_agrees_with_the_reference(tmp_path, prompts):
    check_compiled(tmp_path / "model", prompts, "phi")


def test_cached_graph_is_not_used_for_other_widths(tmp_path, prompts):
    """Top-K values and unmasked layers are constants in the graph, so the compile cache must distinguish them."""
    check_compiled(tmp_path / "first", prompts, "llama")
    check_compiled(tmp_path / "second", prompts, "llama", vo_head_dims=[9, 32], qk_head_dims=[32, 24])
