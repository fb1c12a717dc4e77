"""200 concurrent streams on a small KV cache for three minutes: checks every answer and the growth of memory.

    python benchmarks/serving_load.py CHECKPOINT [--streams 200] [--seconds 180]

Every text is compared with that of a single request at temperature 0. The cache holds only a few sequences, so vLLM
preempts and recomputes continuously. The queue is smaller than the number of clients, so some get 429 and retry. The
last line is JSON. Exit code 1 if an answer was lost or wrong, or a 429 was malformed.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil
from serving_clients import make_prompts, model_name, serve, stream

ENGINE = ["--max-model-len", "512", "--block-size", "32", "--num-gpu-blocks-override", "48", "--max-num-seqs", "64"]
TOKENS = 48
PROMPTS = 64


def resident_bytes(port: int) -> int:
    """Memory of the server that listens on ``port``, and of its engine."""
    listening = [c.pid for c in psutil.net_connections() if c.status == "LISTEN" and c.laddr.port == port and c.pid]
    family = [psutil.Process(listening[0]), *psutil.Process(listening[0]).children(recursive=True)]
    return sum(process.memory_info().rss for process in family)


async def push(address: str, model: str, expected: dict[str, str], count: int, seconds: float) -> dict:
    """Counts of the responses to ``count`` clients in ``seconds``."""
    seen = {"right": 0, "wrong": 0, "lost": 0, "refused": 0, "malformed": 0, "largest_queue": 0}
    memory: list[int] = []
    prompts = list(expected)
    deadline = time.monotonic() + seconds
    port = int(address.rpartition(":")[2])

    async def client(http: httpx.AsyncClient, index: int) -> None:
        number = index
        while time.monotonic() < deadline:
            prompt = prompts[number % len(prompts)]
            number += 7
            answer = await stream(http, model, prompt, TOKENS)
            if answer.status == 429:
                seen["refused"] += 1
                seen["malformed"] += not (answer.retry_after or "").isdigit()
                await asyncio.sleep(min(float(answer.retry_after or 1), 5.0))
            elif answer.status != 200 or answer.finish_reason != "length":
                seen["lost"] += 1
            else:
                seen["right" if answer.text == expected[prompt] else "wrong"] += 1

    async def watch(http: httpx.AsyncClient) -> None:
        while time.monotonic() < deadline:
            budget = (await http.get("/v1/tomoe/budget")).json()
            seen["largest_queue"] = max(seen["largest_queue"], budget["in_use"]["waiting"])
            memory.append(resident_bytes(port))
            await asyncio.sleep(2)

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=600, limits=limits) as http:
        await asyncio.gather(watch(http), *(client(http, index) for index in range(count)))
    third = max(1, len(memory) // 3)
    growth = sum(memory[-third:]) / third - sum(memory[third : 2 * third]) / third if len(memory) > 2 else 0.0
    return seen | {"memory_bytes": memory[-1], "memory_growth_last_third_bytes": growth}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--queue-size", type=int, default=100)
    arguments = parser.parse_args()
    command = ["-m", "tomoe_vllm.cli", "serve", str(arguments.checkpoint), "--no-measure"]
    command += ["--queue-size", str(arguments.queue_size), "--", *ENGINE]
    with tempfile.TemporaryDirectory() as folder, serve(command, Path(folder) / "log") as address:
        model = model_name(address)

        async def alone() -> dict[str, str]:
            async with httpx.AsyncClient(base_url=address, timeout=600) as http:
                return {p: (await stream(http, model, p, TOKENS)).text for p in make_prompts(PROMPTS)}

        expected = asyncio.run(alone())
        print(f"{len(set(expected.values()))} different texts of {PROMPTS} prompts", file=sys.stderr)
        result = asyncio.run(push(address, model, expected, arguments.streams, arguments.seconds))
    print(json.dumps(result | {"streams": arguments.streams, "seconds": arguments.seconds}))
    sys.exit(1 if result["wrong"] or result["lost"] or result["malformed"] else 0)


if __name__ == "__main__":
    main()
