"""``tomoe tune``: measures where the expert MLP should change its way, and writes this device's table."""

import json
import statistics
import sys
from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch

from tomoe_vllm.bench.measure import interleave
from tomoe_vllm.bench.op import make_layers
from tomoe_vllm.bench.shapes import Shape
from tomoe_vllm.kernels import native
from tomoe_vllm.kernels.expert_mlp.thresholds import Thresholds, device_name

NUM_TOKENS = (1, 2, 4, 8, 16, 32, 64)
GROUP_TOKENS, STREAMED_TOKENS = (1, 2, 4, 6, 8), (1, 2, 4, 8, 16, 32)


def best(times: dict[tuple[int, int, int], float]) -> Thresholds:
    """The pair whose times, relative to the best at each number of tokens, have the smallest sum.

    ``times``: seconds by (group_tokens, streams, num_tokens), ``streams`` 1 where W_down is streamed, 0 packed.
    """
    fastest = {m: min(t for (_, _, n), t in times.items() if n == m) for (_, _, m) in times}

    def cost(pair: tuple[int, int]) -> float:
        group, streamed = pair
        return sum(times[group, int(m <= streamed), m] / fastest[m] for m in fastest)

    group, streamed = min(product(sorted({g for g, _, _ in times}), STREAMED_TOKENS), key=cost)
    return Thresholds(group_tokens=group, streamed_tokens=streamed)


def tune(shape: Shape, folder: Path, rounds: int = 15) -> dict:
    """Measure on random layers of ``shape`` and write ``folder/<device>.json``.

    Raises ``RuntimeError`` without a C++ compiler.
    """
    if not native.load():
        raise RuntimeError("the CPU kernels could not be compiled, so there is nothing to tune; install g++")
    layers = make_layers(shape, ("shared",))
    generator = torch.Generator().manual_seed(1)
    times = {}
    for num_tokens in NUM_TOKENS:
        x = torch.randn(num_tokens, shape.hidden_size, generator=generator)
        ids = torch.randint(shape.num_experts, (num_tokens,), generator=generator)
        ways = {}
        for group, streams in product(GROUP_TOKENS, (0, 1)):
            thresholds = Thresholds(group_tokens=group, streamed_tokens=num_tokens if streams else 1)
            ways[f"{group} {streams}"] = lambda x=x, ids=ids, thresholds=thresholds: [
                layer.shared(x, ids, thresholds) for layer in layers
            ]
        for name, samples in interleave(ways, rounds).items():
            group, streams = map(int, name.split())
            times[group, streams if num_tokens > 1 else 1, num_tokens] = statistics.median(samples)
        if num_tokens == 1:  # one token is streamed whatever the threshold
            times |= {(group, 0, 1): times[group, 1, 1] for group in GROUP_TOKENS}
        print(f"{num_tokens} tokens measured", file=sys.stderr)
    thresholds = best(times)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{device_name()}.json"
    file.write_text(json.dumps(asdict(thresholds)) + "\n")
    return {"file": str(file)} | asdict(thresholds)
