"""LangChain's OpenAI client with address, key and model only."""

import asyncio
from typing import Literal

import pytest
from openai import OpenAI
from pydantic import BaseModel

from tests.serving.conftest import KEY, Live

pytestmark = pytest.mark.engine

QUESTION = "What is the weather in Paris?"


class Weather(BaseModel):
    """Weather of a city."""

    city: Literal["Oslo", "Paris", "Rome"]
    dry: bool


def _connect(live: Live, *, max_tokens: int, **options):
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(
        base_url=live.base_url, api_key=KEY, model=live.model, max_tokens=max_tokens, temperature=0, **options
    )


def test_invoke_stream_and_async_give_the_same_answer(live):
    model = _connect(live, max_tokens=6)
    answer = model.invoke(live.prompt)
    assert answer.content
    assert answer.usage_metadata["output_tokens"] == 6
    assert answer.response_metadata["finish_reason"] == "length"
    assert "".join(chunk.content for chunk in model.stream(live.prompt)) == answer.content

    async def ask():
        chunks = [chunk.content async for chunk in model.astream(live.prompt)]
        return (await model.ainvoke(live.prompt)).content, "".join(chunks)

    assert asyncio.run(ask()) == (answer.content, answer.content)


def test_stream_carries_usage(live):
    chunks = list(_connect(live, max_tokens=3, stream_usage=True).stream(live.prompt))
    assert sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata) == 3


def test_batch_gives_the_answers_of_single_prompts(live):
    model = _connect(live, max_tokens=4)
    together = [answer.content for answer in model.batch(live.prompts[:4])]
    assert together == [model.invoke(prompt).content for prompt in live.prompts[:4]]


def test_responses_api_gives_the_answer_of_the_openai_sdk(live):
    answer = _connect(live, max_tokens=4, use_responses_api=True).invoke(live.prompt)
    with OpenAI(base_url=live.base_url, api_key=KEY, timeout=600) as client:
        reply = client.responses.create(model=live.model, input=live.prompt, max_output_tokens=4, temperature=0)
    assert answer.text == reply.output_text != ""
    assert answer.usage_metadata["input_tokens"] == reply.usage.input_tokens


@pytest.mark.slow
def test_structured_output_is_an_instance_of_the_class(demo):
    answer = _connect(demo, max_tokens=150).with_structured_output(Weather).invoke(QUESTION)
    assert isinstance(answer, Weather)


@pytest.mark.slow
def test_bound_tool_is_called_streamed_or_not(demo):
    from langchain_core.tools import tool

    @tool
    def weather(city: Literal["Oslo", "Paris", "Rome"], is_tomorrow: bool) -> str:
        """Tell the weather of a city."""
        return f"{city}, {is_tomorrow}: dry"

    model = _connect(demo, max_tokens=150).bind_tools([weather], tool_choice="any", strict=True)
    (call,) = model.invoke(QUESTION).tool_calls
    result = weather.invoke(call)
    assert result.tool_call_id == call["id"]
    assert result.content.endswith(": dry")
    whole = None
    for chunk in model.stream(QUESTION):
        whole = chunk if whole is None else whole + chunk
    (streamed,) = whole.tool_calls
    assert (streamed["name"], streamed["args"]) == (call["name"], call["args"])
