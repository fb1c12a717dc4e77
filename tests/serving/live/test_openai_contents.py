"""JSON schemas and tool calls through the OpenAI SDK; they need a real vocabulary."""

import asyncio
import json
from typing import Literal

import jsonschema
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from pydantic import BaseModel, ConfigDict

from tests.serving.conftest import KEY

pytestmark = [pytest.mark.engine, pytest.mark.slow]

QUESTION = "What is the weather in Paris?"
MESSAGES = [{"role": "user", "content": QUESTION}]
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Oslo", "Paris", "Rome"]},
        "degrees": {"type": "integer", "minimum": -50, "maximum": 60},
        "hours": {"type": "array", "items": {"enum": ["day", "night"]}, "minItems": 2, "maxItems": 2},
        "dry": {"type": "boolean"},
    },
    "required": ["city", "degrees", "hours", "dry"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "report", "schema": SCHEMA, "strict": True}}


class Weather(BaseModel):
    """Weather of a city."""

    model_config = ConfigDict(extra="forbid")
    city: Literal["Oslo", "Paris", "Rome"]
    dry: bool


class Clock(BaseModel):
    """Time of a zone."""

    model_config = ConfigDict(extra="forbid")
    zone: Literal["CET", "UTC"]


TOOLS = [openai.pydantic_function_tool(Weather), openai.pydantic_function_tool(Clock)]
NAMED = {"type": "function", "function": {"name": "Weather"}}
RESPONSES_TOOL = {"type": "function", **TOOLS[0]["function"]}


@pytest.fixture(scope="module")
def client(demo):
    with OpenAI(base_url=demo.base_url, api_key=KEY, max_retries=0, timeout=600) as client:
        yield client


@pytest.fixture(scope="module")
def arguments(demo):
    return {"model": demo.model, "messages": MESSAGES, "max_tokens": 150, "temperature": 0}


def test_json_satisfies_its_schema_streamed_or_not(client, arguments):
    reply = client.chat.completions.create(**arguments, response_format=FORMAT)
    jsonschema.validate(json.loads(reply.choices[0].message.content), SCHEMA)
    assert reply.choices[0].finish_reason == "stop"
    stream = client.chat.completions.create(**arguments, response_format=FORMAT, stream=True)
    parts = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(parts) == reply.choices[0].message.content
    assert sum(map(bool, parts)) > 5  # streamed in parts


def test_answers_are_parsed_into_a_class(client, demo, arguments):
    async def ask():
        async with AsyncOpenAI(base_url=demo.base_url, api_key=KEY, max_retries=0, timeout=600) as asking:
            return await asking.chat.completions.parse(**arguments, response_format=Weather)

    reply = client.chat.completions.parse(**arguments, response_format=Weather)
    assert isinstance(reply.choices[0].message.parsed, Weather)
    assert asyncio.run(ask()).choices[0].message.parsed == reply.choices[0].message.parsed


@pytest.mark.parametrize(("choice", "finish"), [(NAMED, "stop"), ("required", "tool_calls")], ids=["named", "required"])
def test_tool_is_called_streamed_or_not(client, arguments, choice, finish):
    options = arguments | {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False}
    reply = client.chat.completions.parse(**options)
    assert reply.choices[0].finish_reason == finish
    (call,) = reply.choices[0].message.tool_calls
    assert call.id
    assert isinstance(call.function.parsed_arguments, {"Weather": Weather, "Clock": Clock}[call.function.name])
    if choice is NAMED:
        assert call.function.name == "Weather"

    with client.chat.completions.stream(**options) as stream:
        pieces = [event for event in stream if event.type == "tool_calls.function.arguments.delta"]
        final = stream.get_final_completion()
    assert len(pieces) > 3
    (streamed,) = final.choices[0].message.tool_calls
    assert streamed.function.name == call.function.name
    assert streamed.function.parsed_arguments == call.function.parsed_arguments  # the texts differ in whitespace
    assert final.choices[0].finish_reason == finish


def test_result_of_a_tool_is_accepted(client, arguments):
    call = client.chat.completions.create(**arguments, tools=TOOLS, tool_choice=NAMED).choices[0].message
    result = {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": "12 degrees"}
    options = arguments | {"messages": [*MESSAGES, call, result], "max_tokens": 4}
    reply = client.chat.completions.create(**options, tools=TOOLS)
    assert reply.choices[0].message.content
    question = client.chat.completions.create(**(arguments | {"max_tokens": 4}), tools=TOOLS)
    assert reply.usage.prompt_tokens > question.usage.prompt_tokens


def test_no_tool_is_called_with_choice_none(client, arguments):
    reply = client.chat.completions.create(**(arguments | {"max_tokens": 4}), tools=TOOLS, tool_choice="none")
    assert not reply.choices[0].message.tool_calls
    assert reply.choices[0].message.content


def test_unknown_tool_is_refused(client, arguments):
    choice = {"type": "function", "function": {"name": "Tide"}}
    with pytest.raises(openai.BadRequestError, match="does not match any of the specified"):
        client.chat.completions.create(**arguments, tools=TOOLS, tool_choice=choice)


def test_responses_api_parses_into_a_class(client, demo):
    reply = client.responses.parse(
        model=demo.model, input=QUESTION, text_format=Weather, max_output_tokens=150, temperature=0
    )
    assert reply.status == "completed"
    assert isinstance(reply.output_parsed, Weather)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "Weather"}], ids=["required", "named"])
def test_responses_api_calls_a_tool(client, demo, choice):
    reply = client.responses.create(
        model=demo.model, input=QUESTION, tools=[RESPONSES_TOOL], tool_choice=choice,
        max_output_tokens=150, temperature=0,
    )  # fmt: skip
    (call,) = [item for item in reply.output if item.type == "function_call"]
    assert call.name == "Weather"
    Weather.model_validate_json(call.arguments)
