"""The page of a report, in Markdown: it can be pasted into a bug report, and read as it is."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

MAX_LINES = 40
"""Failures, and groups of checks that were not run, that are listed; the JSON has all."""
LIMIT = 60_000
"""Characters of a page: a comment on GitHub holds 65,536."""

Rows = list[dict[str, Any]]


def render(facts: dict[str, Any]) -> str:
    """The page of ``Report.as_json()``."""
    results: Rows = facts["results"]
    sections = [
        _head(facts),
        _parts(results),
        _list("Failed", [result for result in results if result["status"] == "failed"]),
        _list("Not run", [result for result in results if result["status"] == "not run"]),
        _machine(facts["environment"], results),
        _kernels([result for result in results if result["part"] == "kernels"]),
        _engines([result for result in results if result["part"] == "engine"]),
        _training([result for result in results if result["part"] == "training"]),
    ]
    page = "\n\n".join(section for section in sections if section) + "\n"
    return page if len(page) <= LIMIT else page[:LIMIT] + "\n\n(The page is cut here; report.json has all results.)\n"


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in Markdown; the first column is aligned to the left."""
    lines = ["| " + " | ".join(headings) + " |", "|" + " --- |" + " ---: |" * (len(headings) - 1)]
    lines += ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def number(value: float | str | None, digits: int = 3) -> str:
    """A number with ``digits`` significant digits; empty for None. "nan" and "inf" stay as they are."""
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:#.{digits}g}".rstrip(".")


def small(value: float | str) -> str:
    """An error with two digits."""
    return value if isinstance(value, str) else f"{value:.1e}"


def ratio(dense: float | None, other: float | None) -> str:
    """Time of ``other`` with the speed-up over ``dense`` in brackets."""
    if other is None:
        return ""
    return number(other) + (f" ({dense / other:.2f} x)" if dense else "")


def _head(facts: dict[str, Any]) -> str:
    environment = facts["environment"]
    gpus = ", ".join(environment.get("gpus") or []) or "no GPU"
    versions = [environment.get(name) for name in ("triton", "transformers", "vllm")]
    versions = [f"torch {environment['torch']}", *(v for v in versions if v), f"tomoe {environment['tomoe_vllm']}"]
    if facts["is_interpreted"]:
        gpus = "no GPU: kernels in Triton's interpreter, at tiny sizes and without times"
    state = "" if facts["is_complete"] else " **The run has not ended; these are the results so far.**"
    return "\n".join(
        [
            "# tomoe doctor --full",
            "",
            f"**{facts['summary']}.** {gpus}, driver {environment.get('driver') or 'none'}; {', '.join(versions)}.",
            f"Started {facts['started']}, {facts['seconds']:.0f} s of at most {facts['limit_s']:.0f} s.{state}",
            "",
            f"Command: `{facts['command']}`. Beside this page, `report.json` has every result and `logs` the output of "
            "each process.",
        ]
    )


def _parts(results: Rows) -> str:
    """Number of checks by part and status."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for result in results:
        counts[result["part"]][result["status"]] += 1
    statuses = ("passed", "failed", "not run", "done")
    return table(
        ["part", *statuses], [[part, *(count[status] for status in statuses)] for part, count in counts.items()]
    )


def _list(title: str, results: Rows) -> str:
    """Names and reasons; checks with one reason are one line."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for result in results:
        groups[result["part"], " ".join(result["reason"].split())].append(result["name"])
    lines = []
    for (_, reason), names in list(groups.items())[:MAX_LINES]:
        which = names[0] if len(names) == 1 else f"{len(names)} checks, {names[0]} ... {names[-1]}"
        lines.append(f"- {which}: {reason}")
    if len(groups) > MAX_LINES:
        lines.append(f"- and {len(groups) - MAX_LINES} more, in report.json")
    return "\n".join([f"## {title}", "", *lines]) if lines else ""


def _machine(environment: dict[str, Any], results: Rows) -> str:
    rows = [[name, _text(value)] for name, value in environment.items()]
    rates = next((result["values"] for result in results if "copy_bytes_per_s" in result["values"]), None)
    if rates:
        rows += [
            ["multiprocessors, capability", f"{rates['multiprocessors']}, {rates['capability']}"],
            ["memory, L2", f"{rates['memory_bytes'] / 2**30:.1f} GiB, {rates['l2_bytes'] / 2**20:.0f} MiB"],
            ["copy", f"{rates['copy_bytes_per_s'] / 1e12:.2f} TB/s (read and written)"],
            ["bfloat16 GEMM, 8192 x 8192 x 8192", f"{rates['bfloat16_gemm_flops'] / 1e12:.0f} TFLOP/s"],
            ["one more empty kernel in a CUDA graph", f"{number(rates['empty_kernel_us'])} us"],
            ["one more addition to 4,096 values in a CUDA graph", f"{number(rates['small_kernel_us'])} us"],
        ]
    return "## Machine\n\n" + table(["", ""], rows).replace("---:", "---")


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value if value is not None else "none")


# ------------------------------------------------------------------------------------------------------------ kernels
def _kernels(results: Rows) -> str:
    """Errors of all kernels; for each layer and dtype that was timed, one table of the MLP and one of the other ops."""
    checks = [r["values"] for r in results if "path" in r["values"] and r["values"]["error"] is None]
    if not checks:
        return ""
    groups: dict[tuple[str, str], Rows] = defaultdict(list)
    for check in checks:
        groups[check["layer"], check["dtype"]].append(check)
    parts = ["## Kernels", "", _errors(groups)]
    for (layer, dtype), rows in groups.items():
        random = [row for row in rows if row["routing"] == "random"]
        for headings, cells in (_mlp_times(random), _op_times(random)):
            if cells:
                parts += ["", f"{layer}, {dtype}: {headings[0]}", "", table(["tokens", *headings[1:]], cells)]
    return "\n".join(parts)


def _errors(groups: dict[tuple[str, str], Rows]) -> str:
    rows = []
    for (layer, dtype), checks in groups.items():
        for path, (num, worst, limit) in _worst(checks).items():
            rows.append([f"{layer}, {dtype}, {path}", num, small(worst), small(limit)])
    text = "Largest error relative to plain torch (of route and mask_values: by how much a wrong choice missed)"
    return f"{text}:\n\n" + table(["layer, dtype, kernel", "sizes", "error", "limit"], rows)


def _worst(checks: Rows) -> dict[str, tuple[int, float, float]]:
    found: dict[str, tuple[int, float, float]] = {}
    for check in checks:
        number_of, worst, _ = found.get(check["path"], (0, 0.0, 0.0))
        found[check["path"]] = number_of + 1, max(worst, check["overall"], check["worst_row"]), check["limit"]
    return found


def _by_size(checks: Rows, paths: Sequence[str]) -> dict[int, dict[str, dict[str, Any]]]:
    sizes: dict[int, dict[str, dict[str, Any]]] = defaultdict(dict)
    for check in checks:
        if check["path"] in paths and check["ms"] is not None:
            sizes[check["num_tokens"]][check["path"]] = check
    return dict(sorted(sizes.items()))


def _mlp_times(checks: Rows) -> tuple[list[str], list[list[str]]]:
    paths = ("gather", "dense", "grouped")
    headings = ["ms of one MLP; in brackets vLLM's dense MLP (cuBLAS) / path; share of the roofline's rate"]
    headings += ["vLLM's dense", *(name for path in paths for name in (path, "of roofline"))]
    cells = []
    for size, by_path in _by_size(checks, paths).items():
        dense = next(iter(by_path.values()))["dense_ms"]
        row = [f"{size:,}", number(dense)]
        for path in paths:
            check = by_path.get(path, {"ms": None, "roofline_ms": None})
            row.append(ratio(dense, check["ms"]))
            row.append(f"{check['roofline_ms'] / check['ms']:.0%}" if check["roofline_ms"] else "")
        cells.append(row)
    return headings, cells


def _op_times(checks: Rows) -> tuple[list[str], list[list[str]]]:
    ops = ("route", "mask_values", "activation")
    cells = []
    for size, by_op in _by_size(checks, ops).items():
        times = [by_op[op]["ms"] if op in by_op else None for op in ops]
        cells.append([f"{size:,}", *(number(None if ms is None else 1e3 * ms) for ms in times)])
    return ["us of one more call in a CUDA graph", *ops], cells


# ------------------------------------------------------------------------------------------------------------ engines
def _engines(results: Rows) -> str:
    if not any(result["values"] for result in results):
        return ""
    parts = ["## vLLM"]
    found: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for result in results:
        if "layout" in result["values"]:
            found[result["values"]["layout"]][result["name"].partition(": ")[2]] = result["values"]
    models = next((result["values"]["model"] for result in results if "model" in result["values"]), "")
    parts += ["", f"Model: {models}.", "", _starts(found), "", _parity(found)]
    for name, key, time in (("decode", "batch", "step_ms"), ("prefill", "prompt_tokens", "ms")):
        parts += _speeds(found, name, key, time)
    parts += _steps(found)
    return "\n".join(part for part in parts if part is not None)


def _starts(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    names = ("start_s", "compilation_mode", "cuda_graphs", "runner")
    rows = []
    for layout, checks in found.items():
        if (start := checks.get("starts")) and "start_s" in start:
            rows.append([layout, number(start["start_s"]), *(start[name] for name in names[1:])])
    return table(["engine", "start, s", "compilation", "CUDA graphs", "runner"], rows)


def _parity(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    rows = []
    for layout, checks in found.items():
        for name in ("decode", "prefill"):
            values = checks.get(f"{name} agrees with HF", {})
            for average in ("median", "mean"):
                if f"{average}_difference" in values:
                    rounding = next(v for k, v in values.items() if k.startswith(f"{average}_of_hf_"))
                    cells = [values[f"{average}_difference"], rounding, values[f"{average}_limit"]]
                    rows.append([f"{layout}, {name}, {average}", values["tokens"], *map(small, cells)])
    headings = ["difference of logprobs from HF in float32, nats", "tokens", "vLLM", "HF in vLLM's dtype", "limit"]
    return table(headings, rows)


def _speeds(found: dict[str, dict[str, dict[str, Any]]], name: str, key: str, time: str) -> list[str]:
    """Times of each engine by size, beside the dense engine."""
    by_layout = {
        layout: {row[key]: row for row in checks[name]["rows"]}
        for layout, checks in found.items()
        if name in checks and "rows" in checks[name]
    }
    if not by_layout:
        return []
    dense = by_layout.get("dense", {})
    rows = []
    for size in next(iter(by_layout.values())):
        row = [str(size)]
        for layout, rows_of in by_layout.items():
            cell = rows_of[size]
            path = f", {cell['path']}" if cell.get("path") else ""
            row.append(ratio(dense[size][time] if size in dense and layout != "dense" else None, cell[time]) + path)
        rows.append(row)
    title = {"decode": "ms of a decode step, with the host", "prefill": "ms to the first token of one prompt"}[name]
    return [
        "",
        f"{title}; in brackets dense / ToMoE; the path of the MLP:",
        "",
        table([key.replace("_", " "), *by_layout], rows),
    ]


def _steps(found: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    rows = []
    for layout, checks in found.items():
        for row in checks.get("kernels of a step", {}).get("rows", []):
            rows.append([f"{layout}, batch {row['batch']}", number(row["kernels"]), number(row["gpu_ms"])])
    if not rows:
        return []
    return [
        "",
        "Kernels of one decode step, and their time without the host:",
        "",
        table(["", "kernels", "GPU, ms"], rows),
    ]


# ----------------------------------------------------------------------------------------------------------- training
def _training(results: Rows) -> str:
    sections = []
    for result in results:
        values = result["values"]
        if "device" not in values:
            continue
        names = [f"step {i + 1}" for i in range(len(values["cpu"]["losses"]))]
        rows = list(zip(names, values["cpu"]["losses"], values["device"]["losses"], strict=True))
        if "perplexity" in values["cpu"]:
            rows.append(("perplexity of the export", values["cpu"]["perplexity"], values["device"]["perplexity"]))
        cells = [[name, number(cpu, 6), number(device, 6)] for name, cpu, device in rows]
        title = f"{result['name']}: loss (largest relative difference {small(values['relative_difference'])})"
        sections += ["", title, "", table(["", "cpu", values["device_type"]], cells)]
    return "\n".join(["## Training", *sections]) if sections else ""
