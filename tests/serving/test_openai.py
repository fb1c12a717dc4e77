"""The OpenAI SDK against a live server: every route and option that clients rely on."""

import asyncio
import json

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.serving.conftest import KEY

pytestmark = pytest.mark.engine

MODEL = "tiny-tomoe"
PROMPT = "w1 w2 w3"
MESSAGES = [{"role": "user", "content": PROMPT}]


@pytest.fixture(scope="module")
def client(server):
    with OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=120) as client:
        yield client


def test_models_are_listed(client, served_model):
    assert [model.id for model in client.models.list()] == [MODEL, str(served_model)]


def test_completion_is_repeatable_at_temperature_zero(client):
    replies = [client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=8, temperature=0) for _ in range(2)]
    assert replies[0].choices[0].text == replies[1].choices[0].text != ""
    assert replies[0].usage.completion_tokens == 8
    assert replies[0].choices[0].finish_reason == "length"


def test_stream_carries_the_same_text_and_its_usage(client):
    whole = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=8, temperature=0)
    options = {"include_usage": True}
    chunks = list(
        client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=8, temperature=0, stream=True, stream_options=options
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage.completion_tokens == 8


def test_chat_streams_deltas_of_the_same_answer(client):
    arguments = {"model": MODEL, "messages": MESSAGES, "max_tokens": 6, "temperature": 0}
    whole = client.chat.completions.create(**arguments)
    stream = client.chat.completions.create(**arguments, stream=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert text == whole.choices[0].message.content != ""


def test_logprobs_name_the_chosen_and_the_next_best_tokens(client):
    reply = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=3, temperature=0, logprobs=True, top_logprobs=2
    )
    entries = reply.choices[0].logprobs.content
    assert len(entries) == 3
    assert all(entry.logprob == max(top.logprob for top in entry.top_logprobs) for entry in entries)


def test_n_choices_and_a_seed_that_repeats_them(client):
    def sample():
        reply = client.completions.create(model=MODEL, prompt=PROMPT, n=3, max_tokens=6, seed=5, temperature=1.5)
        return sorted(choice.text for choice in reply.choices)

    first = sample()
    assert len(set(first)) > 1
    assert sample() == first


def test_stop_ends_the_text_before_the_stop_string(client):
    whole = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=24, temperature=0).choices[0].text
    stop = whole.split()[-1]
    reply = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=24, temperature=0, stop=stop)
    assert reply.choices[0].finish_reason == "stop"
    assert reply.choices[0].text == whole[: whole.index(stop)]


def test_choice_is_held_by_the_grammar(client):
    reply = client.completions.create(
        model=MODEL, prompt=PROMPT, max_tokens=4, extra_body={"structured_outputs": {"choice": ["w4", "w5"]}}
    )
    assert reply.choices[0].text.strip() in ("w4", "w5")


def test_a_tool_is_accepted_where_none_is_called(client):
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    tool = {"type": "function", "function": {"name": "weather", "parameters": parameters}}
    reply = client.chat.completions.create(model=MODEL, messages=MESSAGES, tools=[tool], max_tokens=4)
    assert reply.choices[0].message.tool_calls in (None, [])


def test_responses_api_answers(client):
    reply = client.responses.create(model=MODEL, input=PROMPT, max_output_tokens=4)
    assert reply.output_text
    assert reply.usage.output_tokens == 4


def test_async_clients_share_the_server(server):
    async def ask(client, index):
        reply = await client.completions.create(model=MODEL, prompt=f"w{index}", max_tokens=4, temperature=0)
        return reply.choices[0].text

    async def ask_all():
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
            together = await asyncio.gather(*(ask(client, index) for index in range(8)))
            return together, [await ask(client, index) for index in range(8)]

    together, alone = asyncio.run(ask_all())
    assert together == alone


@pytest.mark.parametrize("is_stream", [False, True])
def test_usage_carries_active_parameters_where_asked(client, server, is_stream):
    extra = {"stream": True, "stream_options": {"include_usage": True}} if is_stream else {}
    raw = client.completions.with_raw_response.create(
        model=MODEL, prompt=PROMPT, max_tokens=3, extra_headers={"X-ToMoE-Usage": "active-parameters"}, **extra
    )
    reply = list(raw.parse())[-1] if is_stream else raw.parse()
    assert reply.usage.model_extra["active_parameters_per_token"] == server.budget()["cost"]["active_parameters"]


def test_usage_is_openais_where_not_asked(client):
    reply = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=3)
    assert "active_parameters_per_token" not in (reply.usage.model_extra or {})


def test_embeddings_are_refused_in_words(client):
    with pytest.raises(openai.BadRequestError, match="generates text"):
        client.embeddings.create(model=MODEL, input="w1")


def test_unknown_model_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.completions.create(model="other", prompt=PROMPT)


def test_wrong_key_is_refused(server):
    with pytest.raises(openai.AuthenticationError, match="not known"):
        OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0).models.list()


def test_budget_adds_up(server):
    budget = server.budget()
    cost = budget["cost"]
    assert 0 < cost["active_parameters"] < cost["total_parameters"]
    assert cost["weight_bytes_per_token"] * 2 == cost["flops_per_token"] * 4  # float32: 4 bytes, 2 operations
    assert cost["kv_bytes_per_token"]["dense"] == 2 * 2 * 32 * 3 * 4  # K and V, 2 heads of 32, 3 layers, 4 bytes
    assert cost["read_parameters_per_token"]["shared"] < cost["read_parameters_per_token"]["masked"]
    assert budget["capacity"]["max_sequences"] == 16
    sizes = [size for size, _ in budget["step_time"]["decode"]]
    assert sizes == [1, 2, 4, 8, 16]
    assert json.dumps(budget)
