"""The measurements as one PNG: speed relative to the dense model, which is 1."""

import sys
from pathlib import Path


def write_plot(results: dict, file: Path) -> None:
    """Plot one panel per measured part. Without matplotlib it prints a message and writes nothing."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed (pip install matplotlib)", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [part for part in ("op", "decode", "prefill") if part in results]
    if not panels:
        return
    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 4), squeeze=False)
    for axis, part in zip(axes[0], panels, strict=True):
        if part == "op":
            _plot_op(axis, results["op"])
        else:
            count = "batch" if part == "decode" else "prompt_tokens"
            axis.plot([row[count] for row in results[part]], [row["ratio"] for row in results[part]], marker="o")
            axis.set_xlabel(count.replace("_", " "))
            axis.set_title(f"{part} in vLLM")
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.axhline(1, color="grey", linewidth=1)
        axis.set_ylim(bottom=0)
    axes[0][0].set_ylabel("speed relative to dense")
    machine = results["machine"].get("gpu", "CPU")
    figure.suptitle(f"{Path(results['model']).name}, p = {results['active_ratio']}, {results['dtype']}, {machine}")
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)


def _plot_op(axis, op: dict) -> None:
    counts = [row["num_tokens"] for row in op["rows"]]
    dense = [row["ms"]["dense"]["median"] for row in op["rows"]]
    for name in op["rows"][0]["ms"]:
        if name != "dense":
            rows = [row for row in op["rows"] if name in row["ms"]]  # gather is for a few tokens only
            ratios = [row["ms"]["dense"]["median"] / row["ms"][name]["median"] for row in rows]
            axis.plot([row["num_tokens"] for row in rows], ratios, marker="o", label=name)
    limits = [d / row["limit_ms"] for d, row in zip(dense, op["rows"], strict=True)]
    axis.plot(counts, limits, linestyle="--", color="black", label="limit")
    axis.set_xlabel("tokens")
    axis.set_title(f"MLP op, {op['shape']}")
    axis.legend()
