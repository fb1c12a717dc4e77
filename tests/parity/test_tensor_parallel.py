"""Two tensor-parallel ranks: heads, neurons and signatures are sharded, head masks are replicated."""

import pytest

from tests.helpers.tiny_models import save_tiny_model
from tests.parity.conftest import max_logprob_difference, reference_completion, start_engine
from tests.parity.test_families import LOGPROB_LIMIT

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        pytest.param("llama", {}, id="gated, biases, tied"),
        pytest.param(
            "qwen3", {"num_key_value_heads": 1}, id="q/k norm; the one KV head is replicated", marks=pytest.mark.slow
        ),
    ],
)
def test_two_ranks_agree_with_the_reference(tmp_path, prompts, family, fields):
    model = save_tiny_model(tmp_path, family, **fields)
    with start_engine(tmp_path, tensor_parallel_size=2) as engine:
        completions = engine.complete(prompts)
    for completion in completions:
        assert reference_completion(model, completion).tokens == completion.tokens
    assert max_logprob_difference(model, completions) < LOGPROB_LIMIT
