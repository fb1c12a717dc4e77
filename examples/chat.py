"""Chat with a served ToMoE model through the OpenAI SDK: one request, a stream, several requests in parallel.

vllm serve ./smollm2-tomoe --trust-remote-code
python examples/chat.py --base-url http://127.0.0.1:8000/v1
"""

import argparse
import asyncio

from openai import AsyncOpenAI, OpenAI

QUESTIONS = ["What is the capital of France?", "Name three primary colours.", "What do bees make?"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="none", help="API key of the server")
    parser.add_argument("--max-tokens", type=int, default=48)
    arguments = parser.parse_args()
    connection = {"base_url": arguments.base_url, "api_key": arguments.api_key}
    client = OpenAI(**connection)
    model = client.models.list().data[0].id
    options = {"model": model, "max_tokens": arguments.max_tokens, "temperature": 0}

    print("--- plain")
    reply = client.chat.completions.create(messages=ask(QUESTIONS[0]), **options)
    print(reply.choices[0].message.content)

    print("--- streamed")
    for chunk in client.chat.completions.create(messages=ask(QUESTIONS[1]), stream=True, **options):
        if chunk.choices and chunk.choices[0].delta.content:
            print(chunk.choices[0].delta.content, end="", flush=True)
    print()

    print("--- in parallel")
    for question, answer in zip(QUESTIONS, asyncio.run(ask_all(connection, options)), strict=True):
        print(f"{question} -> {answer!r}")


def ask(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


async def ask_all(connection: dict, options: dict) -> list[str]:
    async with AsyncOpenAI(**connection) as client:
        calls = [client.chat.completions.create(messages=ask(question), **options) for question in QUESTIONS]
        replies = await asyncio.gather(*calls)
    return [reply.choices[0].message.content for reply in replies]


if __name__ == "__main__":
    main()
