"""Time per output token with ``--tpot-slo-ms`` under overload: the SLO of 8 streams, 64 clients.

    python benchmarks/serving_slo.py CHECKPOINT [--seconds 60] [--profile FILE]

The SLO is the 95th percentile of the time per output token of 8 streams on a server without an SLO, over three rounds.
A server with this SLO then gets requests from 64 clients, which send the next one as soon as one is answered, and after
a 429 when Retry-After has passed. The last line is JSON. Goal: the 95th percentile within 1.15 x the SLO.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path

import httpx
from serving_clients import Answer, make_prompts, model_name, quantile, serve, stream, streams

ENGINE = ["--max-model-len", "512"]
TOKENS = 48


async def push(address: str, model: str, clients: int, seconds: float) -> list[Answer]:
    """All responses, refusals included, to clients that send requests without a pause."""
    answers: list[Answer] = []
    deadline = time.monotonic() + seconds

    async def client(http: httpx.AsyncClient, index: int) -> None:
        number = 0
        while time.monotonic() < deadline:
            answer = await stream(http, model, make_prompts(1, seed=1000 * index + number)[0], TOKENS)
            answers.append(answer)
            number += 1
            if answer.status == 429:
                await asyncio.sleep(min(float(answer.retry_after or 1), max(0.0, deadline - time.monotonic())))

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=600, limits=limits) as http:
        await asyncio.gather(*(client(http, index) for index in range(clients)))
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--queue-size", type=int, default=16)
    arguments = parser.parse_args()
    base = ["-m", "tomoe_vllm.cli", "serve", str(arguments.checkpoint)]
    with tempfile.TemporaryDirectory() as folder:
        log, profile = Path(folder) / "log", Path(folder) / "profile.json"
        with serve([*base, "--profile", str(profile), "--", *ENGINE], log) as address:
            model = model_name(address)
            rounds = [
                asyncio.run(streams(address, model, make_prompts(arguments.streams, seed=r), TOKENS)) for r in range(4)
            ]
        slo = quantile([answer.tpot_ms for answers in rounds[1:] for answer in answers], 0.95)
        print(f"{arguments.streams} streams take {slo:.1f} ms per token", file=sys.stderr)
        flags = ["--tpot-slo-ms", f"{slo:.2f}", "--queue-size", str(arguments.queue_size), "--profile", str(profile)]
        with serve([*base, *flags, "--", *ENGINE], log) as address:
            budget = httpx.get(f"{address}/v1/tomoe/budget", timeout=60).json()
            answers = asyncio.run(push(address, model, arguments.clients, arguments.seconds))
    served = [answer for answer in answers if answer.status == 200]
    tpots = [answer.tpot_ms for answer in served if len(answer.arrivals) > 1]
    result = {
        "slo_ms": slo,
        "tpot_p50_ms": quantile(tpots, 0.5),
        "tpot_p95_ms": quantile(tpots, 0.95),
        "p95_over_slo": quantile(tpots, 0.95) / slo,
        "served": len(served),
        "refused": sum(answer.status == 429 for answer in answers),
        "other": sum(answer.status not in (200, 429) for answer in answers),
        "capacity": budget["capacity"],
        "step_time": budget["step_time"],
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
