"""What can ToMoE gain on a GPU, by batch size? Run: python benchmarks/roofline.py --active-ratio 0.5

Two tables, both arithmetic: steps of whole models with the routers and their launches
(tomoe_vllm/diagnostics/step_cost.py), then the MLPs of LLaMA-2 7B alone, at best (roofline.py).
Times in ms; "x" is dense time / time. The last line is JSON.
"""

import argparse
import dataclasses
import json

from tomoe_vllm.diagnostics.roofline import CHIPS, LLAMA_2_7B, WORTH_IT, costs
from tomoe_vllm.diagnostics.step_cost import MAX_GATHER_TOKENS, MODELS, Step, step_seconds

TOKENS = (1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
STEPS = [*(Step(num_tokens=n) for n in (1, 2, 4, 8, 16, 64, 128, 256)),
         *(Step(num_tokens=n, is_prefill=True) for n in (2048, 8192))]  # fmt: skip
SHARED = ("gather", "dense", "grouped")
"""Execution paths of the shared layout, which uses the fastest for each number of tokens."""


def step_rows(active_ratio: float, num_experts: int) -> list[dict]:
    """One row per model, chip and step, with milliseconds by layout, and by path of the shared layout."""
    table = []
    for model in MODELS:
        mlp = dataclasses.replace(model.mlp, width=round(active_ratio * model.mlp.num_neurons), num_experts=num_experts)
        for chip in CHIPS:
            for step in STEPS:
                seconds = step_seconds(dataclasses.replace(model, mlp=mlp), step, chip)
                if step.num_tokens > MAX_GATHER_TOKENS:
                    del seconds["shared gather"]
                milliseconds = {name: 1e3 * value for name, value in seconds.items()}
                table.append({"model": model.name, "chip": chip.name, "step": str(step), "ms": milliseconds})
    return table


def step_markdown(table: list[dict]) -> str:
    """The table of steps of docs/performance.md. Bold: slower than ``auto`` accepts."""
    lines = ["| model | chip | step | dense, ms | masked | shared, best path | fused |", "|---" * 7 + "|"]
    for row in table:
        times = row["ms"]
        best = min((name for name in times if name.startswith("shared ")), key=times.__getitem__)

        def speed(name: str, times: dict[str, float] = times) -> str:
            ratio = round(times["dense"] / times[name], 2)
            return f"{ratio:.2f} x" if ratio >= WORTH_IT else f"**{ratio:.2f} x**"

        cells = [f"{times['dense']:.2f}", speed("masked"), f"{speed(best)} ({best.split()[1]})", speed("fused")]
        lines.append(f"| {row['model']} | {row['chip']} | {row['step']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def rows(active_ratio: float, num_experts: int) -> list[dict]:
    """One row per chip and number of tokens, with milliseconds by path."""
    width = round(active_ratio * LLAMA_2_7B.num_neurons)
    shape = dataclasses.replace(LLAMA_2_7B, width=width, num_experts=num_experts)
    table = []
    for chip in CHIPS:
        for num_tokens in TOKENS:
            milliseconds = {path: 1e3 * cost.seconds(chip) for path, cost in costs(shape, num_tokens).items()}
            best = min(SHARED, key=milliseconds.__getitem__)
            table.append({"chip": chip.name, "tokens": num_tokens, "ms": milliseconds, "best": best})
    return table


def markdown(table: list[dict]) -> str:
    """The table of docs/performance.md."""
    paths = list(table[0]["ms"])
    lines = [f"| chip | tokens | {' | '.join(paths)} | best of shared |", "|---" * (len(paths) + 3) + "|"]
    for row in table:
        dense = row["ms"]["dense"]
        # Gather is for a few tokens; the rest of its column is meaningless.
        shown = {path: ms for path, ms in row["ms"].items() if path != "gather" or row["tokens"] <= 8}
        cells = [f"{shown[path]:.2f} ({dense / shown[path]:.2f}x)" if path in shown else "" for path in paths]
        best = f"{row['best']} {dense / row['ms'][row['best']]:.2f}x"
        lines.append(f"| {row['chip']} | {row['tokens']} | {' | '.join(cells)} | {best} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--active-ratio", type=float, default=0.5, help="p: neurons of an expert / neurons")
    parser.add_argument("--num-experts", type=int, default=8)
    arguments = parser.parse_args()
    if not 0 < arguments.active_ratio <= 1 or arguments.num_experts < 1:
        parser.error("--active-ratio must be in (0, 1], and --num-experts at least 1")
    steps = step_rows(arguments.active_ratio, arguments.num_experts)
    table = rows(arguments.active_ratio, arguments.num_experts)
    print(f"{step_markdown(steps)}\n\n{markdown(table)}")
    settings = {"active_ratio": arguments.active_ratio, "num_experts": arguments.num_experts}
    print(json.dumps(settings | {"steps": steps, "rows": table}))


if __name__ == "__main__":
    main()
