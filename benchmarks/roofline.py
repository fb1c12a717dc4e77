"""What can ToMoE gain on a GPU, at best, by batch size? Run: python benchmarks/roofline.py --active-ratio 0.5

The MLPs of LLaMA-2 7B on A100 and H100, by tomoe_vllm/diagnostics/roofline.py: arithmetic, nothing is measured.
Times in ms per step of all layers; "x" is dense time / time. The last line is JSON.
"""

import argparse
import dataclasses
import json

from tomoe_vllm.diagnostics.roofline import CHIPS, LLAMA_2_7B, costs

TOKENS = (1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
SHARED = ("gather", "dense", "grouped")
"""Execution paths of the shared layout, which uses the fastest for each number of tokens."""


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
    table = rows(arguments.active_ratio, arguments.num_experts)
    print(markdown(table))
    print(json.dumps({"active_ratio": arguments.active_ratio, "num_experts": arguments.num_experts, "rows": table}))


if __name__ == "__main__":
    main()
