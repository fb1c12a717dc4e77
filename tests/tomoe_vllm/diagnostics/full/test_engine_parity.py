"""What counts as agreement of an engine with the Hugging Face model."""

import pytest
import torch

from tests.helpers.routes import expert_counts as counts_of
from tests.helpers.routes import reference_routes
from tests.helpers.tiny_models import NUM_EXPERTS, save_tiny_model, tiny_model
from tomoe_vllm.diagnostics.full.engine_parity import (
    Text,
    compare,
    expert_counts,
    judge,
    make_prompts,
    reference_logprobs,
)

EXACT = -torch.linspace(1, 5, 40)
NOISE = 0.01 * torch.tensor([1.0, -1.0, 0.5, -0.5]).repeat(10)


@pytest.mark.parametrize(
    ("engine", "agrees"),
    [
        pytest.param(EXACT + NOISE, True, id="as much rounding as Hugging Face's"),
        pytest.param(EXACT + 2 * NOISE, True, id="twice as much"),
        pytest.param(EXACT + 10 * NOISE, False, id="ten times as much"),
        pytest.param(EXACT + 1, False, id="a wrong layer"),
        pytest.param(torch.where(torch.arange(40) < 4, EXACT + 3, EXACT), False, id="some tokens far off"),
        pytest.param(torch.where(torch.arange(40) == 0, torch.nan, EXACT), False, id="a NaN"),
    ],
)
def test_an_engine_may_round_as_much_as_hugging_face(engine, agrees):
    reason, values = judge(engine, EXACT + NOISE, EXACT, "bfloat16")
    assert (reason is None) == agrees
    assert values["tokens"] == 40


def test_float32_leaves_no_room():
    assert judge(EXACT + NOISE, EXACT, EXACT, "float32")[0] is not None
    assert judge(EXACT + 1e-6, EXACT, EXACT, "float32")[0] is None


def text_of(model, tokens, num_logprobs):
    with torch.no_grad():
        logprobs = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
    row = logprobs[range(len(tokens) - 1), tokens[1:]]
    return Text(tokens, row[-num_logprobs:])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    save_tiny_model(folder, "llama")
    return folder


def test_logprobs_of_the_last_tokens_are_compared(folder):
    model = tiny_model("llama")
    texts = [text_of(model, prompt, 4) for prompt in make_prompts(96, 128)[1:]]
    (reason, values) = compare({"decode": texts}, folder, "float32", "cpu")["decode"]
    assert reason is None, reason
    assert values["tokens"] == 4 * len(texts)
    wrong = [Text(text.tokens, text.logprobs.roll(1)) for text in texts]
    assert compare({"decode": wrong}, folder, "float32", "cpu")["decode"][0] is not None


def test_choices_of_the_model_are_counted():
    model = tiny_model("llama")
    tokens = [5, 6, 7]
    with torch.no_grad():
        best = int(model(torch.tensor([tokens])).logits[0, -1].argmax())
    assert reference_logprobs(model, Text([*tokens, best], torch.zeros(1)))[1] == 1
    assert reference_logprobs(model, Text([*tokens, (best + 1) % 96], torch.zeros(1)))[1] == 0


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_experts_are_counted_without_the_last_token(family):
    model = tiny_model(family)
    prompts = make_prompts(96, 128)
    expected = counts_of([reference_routes(model, prompt[:-1]) for prompt in prompts[1:]], NUM_EXPERTS)
    found = expert_counts(model, [Text(prompt, torch.zeros(1)) for prompt in prompts[1:]])
    assert found.tolist() == expected.tolist()


def test_prompts_leave_room_for_an_answer():
    assert max(map(len, make_prompts(96, 128))) == 33
    assert max(map(len, make_prompts(96, 2080))) == 300
