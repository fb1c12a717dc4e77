"""The OpenAI SDK against a running server: routes and options that clients use, on both models."""

import asyncio
import json

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from tests.serving.conftest import KEY

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def client(live):
    with OpenAI(base_url=live.base_url, api_key=KEY, max_retries=0, timeout=600) as client:
        yield client


@pytest.fixture(scope="module")
def complete(client, live):
    """``complete(**options)``: a completion of the model's prompt."""
    return lambda **options: client.completions.create(**({"model": live.model, "prompt": live.prompt} | options))


@pytest.fixture(scope="module")
def chat(client, live):
    """``chat(**options)``: an answer to the model's prompt."""
    messages = [{"role": "user", "content": live.prompt}]
    return lambda **options: client.chat.completions.create(model=live.model, messages=messages, **options)


def test_models_are_listed(client, live):
    assert [model.id for model in client.models.list()] == [live.model, str(live.checkpoint)]


def test_completion_is_deterministic_at_temperature_zero(complete):
    replies = [complete(max_tokens=8, temperature=0) for _ in range(2)]
    assert replies[0].choices[0].text == replies[1].choices[0].text != ""
    assert replies[0].usage.completion_tokens == 8
    assert replies[0].choices[0].finish_reason == "length"


def test_stream_has_the_same_text_and_usage(complete):
    whole = complete(max_tokens=8, temperature=0)
    chunks = list(complete(max_tokens=8, temperature=0, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[-1].usage.completion_tokens == 8
    assert chunks[-1].usage == whole.usage


def test_chat_streams_the_same_answer(chat):
    whole = chat(max_tokens=6, temperature=0)
    chunks = list(chat(max_tokens=6, temperature=0, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content != ""
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_stream_has_no_usage_by_default(chat):
    chunks = list(chat(max_tokens=3, stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)


def test_logprobs_list_the_chosen_and_the_next_best_tokens(chat):
    reply = chat(max_tokens=3, temperature=0, logprobs=True, top_logprobs=2)
    entries = reply.choices[0].logprobs.content
    assert len(entries) == 3
    assert all(entry.logprob == max(top.logprob for top in entry.top_logprobs) for entry in entries)


def test_n_choices_are_repeated_with_the_same_seed(complete):
    def sample():
        reply = complete(n=3, max_tokens=6, seed=5, temperature=1.5)
        return sorted(choice.text for choice in reply.choices)

    first = sample()
    assert len(set(first)) > 1
    assert sample() == first


def test_stop_ends_the_text_before_the_stop_string(complete):
    whole = complete(max_tokens=24, temperature=0).choices[0].text
    stop = whole.split()[-1]
    reply = complete(max_tokens=24, temperature=0, stop=stop)
    assert reply.choices[0].finish_reason == "stop"
    assert reply.choices[0].text == whole[: whole.index(stop)]


def test_grammar_restricts_the_choice(complete, live):
    reply = complete(max_tokens=4, extra_body={"structured_outputs": {"choice": live.choices}})
    assert reply.choices[0].text.strip() in live.choices


def test_request_with_a_tool_is_accepted(chat):
    parameters = {"type": "object", "properties": {"city": {"type": "string"}}}
    tool = {"type": "function", "function": {"name": "weather", "parameters": parameters}}
    reply = chat(tools=[tool], max_tokens=4)
    assert reply.choices[0].message.tool_calls in (None, [])


def test_responses_api_generates(client, live):
    reply = client.responses.create(model=live.model, input=live.prompt, max_output_tokens=4)
    assert reply.output_text
    assert reply.usage.output_tokens == 4


def test_responses_api_streams_the_same_answer(client, live):
    arguments = {"model": live.model, "input": live.prompt, "max_output_tokens": 4, "temperature": 0}
    whole = client.responses.create(**arguments)
    events = list(client.responses.create(**arguments, stream=True))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == events[-1].response.output_text == whole.output_text
    assert events[-1].response.usage.output_tokens == 4


def test_async_requests_get_the_answers_of_single_ones(live):
    async def ask(client, prompt):
        reply = await client.completions.create(model=live.model, prompt=prompt, max_tokens=4, temperature=0)
        return reply.choices[0].text

    async def ask_all():
        async with AsyncOpenAI(base_url=live.base_url, api_key=KEY, max_retries=0, timeout=600) as client:
            together = await asyncio.gather(*(ask(client, prompt) for prompt in live.prompts))
            return together, [await ask(client, prompt) for prompt in live.prompts]

    together, alone = asyncio.run(ask_all())
    assert len(together) == 8
    assert together == alone


def test_async_stream_has_the_same_text(complete, live):
    async def read():
        async with AsyncOpenAI(base_url=live.base_url, api_key=KEY, max_retries=0, timeout=600) as client:
            stream = await client.completions.create(
                model=live.model, prompt=live.prompt, max_tokens=6, temperature=0, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

    assert asyncio.run(read()) == complete(max_tokens=6, temperature=0).choices[0].text != ""


@pytest.mark.parametrize("is_stream", [False, True])
def test_usage_has_active_parameters_with_the_header(client, live, is_stream):
    extra = {"stream": True, "stream_options": {"include_usage": True}} if is_stream else {}
    headers = {"X-ToMoE-Usage": "active-parameters"}
    raw = client.completions.with_raw_response.create(
        model=live.model, prompt=live.prompt, max_tokens=3, extra_headers=headers, **extra
    )
    reply = list(raw.parse())[-1] if is_stream else raw.parse()
    active = live.server.budget()["cost"]["active_parameters"]
    assert reply.usage.model_extra["active_parameters_per_token"] == active


def test_usage_has_only_openais_fields_by_default(complete):
    reply = complete(max_tokens=3)
    assert "active_parameters_per_token" not in (reply.usage.model_extra or {})


def test_embeddings_are_refused_with_the_reason(client, live):
    with pytest.raises(openai.BadRequestError, match="generates text only"):
        client.embeddings.create(model=live.model, input=live.prompt)


def test_unknown_model_is_not_found(complete):
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        complete(model="other")


def test_wrong_key_is_refused(live):
    with pytest.raises(openai.AuthenticationError, match="not valid"):
        OpenAI(base_url=live.base_url, api_key="wrong", max_retries=0).models.list()


def test_budget_is_consistent(live):
    budget = live.server.budget()
    cost = budget["cost"]
    assert 0 < cost["active_parameters"] < cost["total_parameters"]
    assert cost["weight_bytes_per_token"] * 2 == cost["flops_per_token"] * 4  # float32: 4 bytes, 2 operations
    assert cost["kv_bytes_per_token"]["dense"] == live.dense_kv_bytes
    assert cost["read_parameters_per_token"]["shared"] < cost["read_parameters_per_token"]["masked"]
    assert budget["capacity"]["max_sequences"] == 16
    sizes = [size for size, _ in budget["step_time"]["decode"]]
    assert sizes == [1, 2, 4, 8, 16]
    assert json.dumps(budget)
