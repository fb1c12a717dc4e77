"""Shared by the serving benchmarks: a server process, and streams that are timed token by token."""

import asyncio
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx

ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
START_LIMIT_S = 900
WORDS = ("the", "of", "river", "small", "light", "in", "house", "and", "green", "old", "time", "music", "sea", "by")


@dataclass
class Answer:
    """One streamed completion: arrival times of its tokens in seconds, text and status."""

    status: int = 0
    start: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    retry_after: str | None = None

    @property
    def ttft_ms(self) -> float:
        """Time to the first token."""
        return 1000 * (self.arrivals[0] - self.start)

    @property
    def tpot_ms(self) -> float:
        """Mean time per output token after the first."""
        return 1000 * (self.arrivals[-1] - self.arrivals[0]) / (len(self.arrivals) - 1)


@contextlib.contextmanager
def serve(command: list[str], log: Path, **variables: str) -> Iterator[str]:
    """Run a server until the block ends; yields its address. ``--port`` is added before any ``--`` of ``command``."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    at = command.index("--") if "--" in command else len(command)
    command = [sys.executable, *command[:at], "--host", "127.0.0.1", "--port", str(port), *command[at:]]
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=ENVIRONMENT | os.environ | variables)
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_LIMIT_S
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start; its log ends: {log.read_text()[-2000:]}")
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{address}/health", timeout=5).status_code == 200:
                    break
            time.sleep(1)
        yield address
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()
        process.wait()


async def stream(client: httpx.AsyncClient, model: str, prompt: str, tokens: int) -> Answer:
    """One greedy completion of exactly ``tokens`` tokens."""
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    answer = Answer(start=time.perf_counter())
    async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        answer.status = response.status_code
        answer.retry_after = response.headers.get("retry-after")
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            for choice in json.loads(line[6:]).get("choices", []):
                answer.arrivals.append(time.perf_counter())
                answer.text += choice["text"]
                answer.finish_reason = choice["finish_reason"] or answer.finish_reason
    return answer


async def streams(address: str, model: str, prompts: list[str], tokens: int) -> list[Answer]:
    """One stream for each prompt, all concurrent."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=600, limits=limits) as client:
        return await asyncio.gather(*(stream(client, model, prompt, tokens) for prompt in prompts))


def make_prompts(count: int, words: int = 24, seed: int = 0) -> list[str]:
    """Distinct prompts of about ``words`` tokens."""
    randomness = random.Random(seed)
    return [" ".join(randomness.choice(WORDS) for _ in range(words)) + f" {index}" for index in range(count)]


def quantile(values: list[float], share: float) -> float:
    """The smallest value that at least ``share`` of all do not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def model_name(address: str) -> str:
    """The first model that a server lists."""
    return httpx.get(f"{address}/v1/models", timeout=60).json()["data"][0]["id"]
