"""Overhead of ``tomoe serve`` over bare ``vllm serve``: throughput at 16 streams, and time to the first token.

    python benchmarks/serving_overhead.py CHECKPOINT [--rounds 5] [--streams 16] [--tokens 64]

Both servers run on the same model with the same flags and are measured alternately, while the other one is idle. The
first round is a warm-up. The last line is JSON. Goals: throughput at least 0.97 x, first token within 5 ms.
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from serving_clients import make_prompts, model_name, serve, streams

ENGINE = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "1024", "--no-enable-prefix-caching"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    checkpoint = str(arguments.checkpoint)
    commands = {
        "vllm": ["-m", "vllm.entrypoints.cli.main", "serve", checkpoint, *ENGINE],
        "tomoe": ["-m", "tomoe_vllm.cli", "serve", checkpoint, "--no-measure", "--", *ENGINE],
    }
    rates: dict[str, list[float]] = {name: [] for name in commands}
    firsts: dict[str, list[float]] = {name: [] for name in commands}
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        addresses = {
            name: stack.enter_context(serve(command, folder / name, VLLM_CPU_KVCACHE_SPACE="1"))
            for name, command in commands.items()
        }
        for round_ in range(arguments.rounds + 1):
            for name, address in addresses.items():
                model = model_name(address)
                start = time.perf_counter()
                answers = asyncio.run(
                    streams(address, model, make_prompts(arguments.streams, seed=round_), arguments.tokens)
                )
                rate = sum(len(answer.arrivals) for answer in answers) / (time.perf_counter() - start)
                alone = asyncio.run(streams(address, model, make_prompts(1, seed=1000 + round_), 2))[0].ttft_ms
                if round_:
                    rates[name].append(rate)
                    firsts[name].append(alone)
                print(f"round {round_}, {name}: {rate:.1f} tokens/s, first token {alone:.1f} ms", file=sys.stderr)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    first = {name: statistics.median(values) for name, values in firsts.items()}
    result = {
        "tokens_per_s": medians,
        "throughput_ratio": statistics.median(t / v for t, v in zip(rates["tomoe"], rates["vllm"], strict=True)),
        "first_token_ms": first,
        "first_token_difference_ms": first["tomoe"] - first["vllm"],
        "rounds": arguments.rounds,
        "streams": arguments.streams,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
