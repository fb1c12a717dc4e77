"""Every family: vLLM gives the same tokens and probabilities as the Hugging Face reference."""

import pytest
import torch

from tests.helpers.tiny_models import UNUSED_EXPERT, save_tiny_model, tiny_model
from tests.parity.conftest import max_logprob_difference, reference_completion, start_engine
from tomoe_vllm.hf.configuration_tomoe import FAMILIES
from tomoe_vllm.hf.tomoe_math import route

pytestmark = pytest.mark.engine

LOGPROB_LIMIT = 1e-4
"""Nats. Measured: 1e-5 on these models; the smallest of the faults below gives more than 1e-2."""


class Pair:
    """One checkpoint: its reference model, its engine, and the completions of 16 prompts."""

    def __init__(self, family, model, engine, prompts):
        self.family, self.model, self.engine = family, model, engine
        self.completions = engine.complete(prompts)


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory, prompts):
    folder = tmp_path_factory.mktemp(request.param)
    model = save_tiny_model(folder, request.param)
    with start_engine(folder) as engine:
        yield Pair(request.param, model, engine, prompts)


def test_greedy_tokens_are_identical(pair):
    for completion in pair.completions:
        assert reference_completion(pair.model, completion).tokens == completion.tokens


def test_logprobs_of_prompts_and_tokens_agree(pair):
    assert max_logprob_difference(pair.model, pair.completions) < LOGPROB_LIMIT


def test_a_prompt_gives_the_same_tokens_alone_and_in_a_batch_of_16(pair):
    assert len(pair.completions) == 16
    for completion in (pair.completions[0], pair.completions[-1]):
        assert pair.engine.complete([completion.prompt])[0].tokens == completion.tokens


def test_the_tiny_model_has_an_expert_that_no_token_uses(pair):
    model, used = tiny_model(pair.family), set()
    for layer in model.model.layers:
        gate = layer.mlp.expert_gate
        layer.get_submodule(FAMILIES[pair.family].mlp_in).register_forward_pre_hook(
            lambda module, args, gate=gate: used.update(route(gate.router(args[0])).flatten().tolist())
        )
    max_logprob_difference(model, pair.completions)
    assert used == set(range(model.config.num_experts)) - {UNUSED_EXPERT}


def _lose_a_neuron(model):
    model.model.layers[1].mlp.expert_gate.signature[5] ^= 0xFF


def _swap_two_experts(model):
    weight = model.model.layers[0].mlp.expert_gate.router.weight.data
    weight[[0, 1]] = weight[[1, 0]].clone()


def _keep_another_query_key_dim(model):
    dims = model.model.layers[0].self_attn.head_gate.query_key_dims
    dims[dims.argmin()] = 1


def _keep_one_value_dim_more(model):
    model.model.layers[1].self_attn.head_gate.top_k += 1


def _scale_by_the_pruned_head(model):
    attention = model.model.layers[0].self_attn
    attention.scaling = model.config.qk_head_dims[0] ** -0.5


@pytest.mark.parametrize(
    "fault",
    [
        _lose_a_neuron,
        _swap_two_experts,
        _keep_another_query_key_dim,
        _keep_one_value_dim_more,
        _scale_by_the_pruned_head,
    ],
)
def test_tolerance_catches(pair, fault):
    broken = tiny_model(pair.family)
    with torch.no_grad():
        fault(broken)
    assert max_logprob_difference(broken, pair.completions) > 100 * LOGPROB_LIMIT
