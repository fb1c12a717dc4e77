"""``tomoe eval compare``: ToMoE and baseline methods on one model, text and budget, in one table.

Every method produces gates on the same frozen float32 model (baselines/) and is measured by the protocol of
perplexity.py. The active ratio of each method is checked: one above the budget is a bug. A method that cannot
fit the budget (an MLP-only method where attention alone exceeds it) gets a row with the reason.
"""

import contextlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from tomoe_training.artifacts.adapter import Adapter
from tomoe_training.artifacts.atomic import write_json
from tomoe_training.artifacts.export import check_base
from tomoe_training.artifacts.model_check import load_base_config, model_tensors
from tomoe_training.artifacts.provenance import provenance
from tomoe_training.artifacts.tokenizer_files import load_tokenizer
from tomoe_training.config import RunConfig, load_run_config
from tomoe_training.data import InterleavedBlocks, pack
from tomoe_training.documents import load_documents
from tomoe_training.dtypes import default_device
from tomoe_training.evaluation.baselines.cmoe import cmoe
from tomoe_training.evaluation.baselines.magnitude import magnitude, magnitude_mlp
from tomoe_training.evaluation.baselines.random_experts import random_experts
from tomoe_training.evaluation.baselines.setup import BaselineSetup, MethodGates
from tomoe_training.evaluation.baselines.static_mask import static_mask
from tomoe_training.evaluation.baselines.trained_adapter import tomoe
from tomoe_training.evaluation.baselines.wanda import wanda, wanda_mlp
from tomoe_training.evaluation.baselines.widths import OutOfBudgetError
from tomoe_training.evaluation.perplexity import (
    load_model,
    negative_log_likelihoods,
    perplexity_from,
    read_text,
    text_blocks,
)
from tomoe_training.tables import print_table
from tomoe_vllm.settings import check_name

METHODS: dict[str, Callable[[BaselineSetup], MethodGates]] = {
    "tomoe": tomoe,
    "magnitude": magnitude,
    "magnitude_mlp": magnitude_mlp,
    "wanda": wanda,
    "wanda_mlp": wanda_mlp,
    "static_mask": static_mask,
    "random_experts": random_experts,
    "cmoe": cmoe,
}
"""All methods, in the order of the table."""


def comparison_config(
    file: Path | None, adapter: Path | None, flags: dict[str, Any], assignments: list[str]
) -> RunConfig:
    """Settings of the runs of all trained methods: the file's, or without a file those of the adapter's training.

    Flags and ``key=value`` assignments override them. Stored settings that no longer exist are ignored.
    """
    settings: dict[str, Any] = {}
    if adapter is not None and file is None:
        trained = Adapter.load(adapter).config
        stored = trained.training.get("config", {})
        settings = {k: v for k, v in stored.items() if k in RunConfig.model_fields}
        for name in ("active_ratio", "num_experts", "vo_mode", "value_router_dim"):
            settings[name] = getattr(trained, name)
    return load_run_config(file, settings | {k: v for k, v in flags.items() if v is not None}, assignments)


def compare(
    config: RunConfig,
    text: Path,
    *,
    adapter: Path | None = None,
    block_size: int = 1024,
    max_blocks: int | None = 40,
    methods: list[str] | None = None,
    work: Path | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Run and measure all methods. Returns the JSON-ready table, and writes it to ``out``.

    ``work`` keeps trained adapters and routers; a comparison that was killed resumes there.
    Raises ``ValueError`` for bad input before anything is computed.
    """
    chosen = _chosen_methods(methods)
    base_folder = Path(config.base)
    model_tensors(base_folder, load_base_config(base_folder), warns=True)
    content = read_text(text)
    _check_options(config, adapter, block_size, out)
    tokenizer = load_tokenizer(base_folder)
    test_blocks = text_blocks(tokenizer, content, block_size, max_blocks)
    packed = [
        pack(load_documents(source, config.text_column, tokenizer), tokenizer, config.sequence_length, source)
        for source in config.data
    ]
    blocks = InterleavedBlocks(packed, config.seed)
    base = load_model(base_folder).requires_grad_(False).to(default_device())
    console = Console(stderr=True)

    def report(line: str) -> None:
        console.print(line, highlight=False, soft_wrap=True)

    def perplexity() -> float:
        return perplexity_from(list(negative_log_likelihoods(base, test_blocks)), test_blocks)

    dense = perplexity()
    rows = [_row("dense", dense, 1.0, 0, 0.0)]
    report(f"dense: perplexity {dense:.2f}")
    with contextlib.ExitStack() as stack:
        folder = work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tomoe-compare-")))
        setup = BaselineSetup(base=base, config=config, blocks=blocks, work=folder, adapter=adapter, report=report)
        for name in chosen:
            report(f"{name} ...")
            rows.append(_measure(name, setup, perplexity))
    table = {
        "base": base_folder.name,
        "text": text.name,
        "data": [Path(source).name for source in config.data],
        "block_size": block_size,
        "blocks": len(test_blocks),
        "scored_tokens": len(test_blocks) * (block_size - 1),
        "active_ratio": config.active_ratio,
        "rows": rows,
    }
    _print(table)
    if out is not None:
        settings = config.model_dump(exclude={"architecture", "notes"})
        out.parent.mkdir(parents=True, exist_ok=True)
        write_json(out, table | {"config": settings, "provenance": provenance()})
    return table


def _check_options(config: RunConfig, adapter: Path | None, block_size: int, out: Path | None) -> None:
    if out is not None and out.exists():
        raise ValueError(f"{out} already exists; choose another --out or remove it")
    if block_size < 2:
        raise ValueError(f"block_size is {block_size}; it must be at least 2")
    if not config.data or "self" in config.data:
        raise ValueError("compare needs training text in files or data sets that all methods read: give --data FILE")
    if adapter is not None:
        check_base(Adapter.load(adapter), Path(config.base))


def _chosen_methods(names: list[str] | None) -> list[str]:
    for name in names or ():
        check_name(name, METHODS, "unknown method")
    return [name for name in METHODS if not names or name in names]


def _measure(name: str, setup: BaselineSetup, perplexity: Callable[[], float]) -> dict[str, Any]:
    started = time.perf_counter()
    try:
        gates = METHODS[name](setup)
    except OutOfBudgetError as error:
        setup.report(f"{name}: {error}")
        return _row(name, None, None, 0, 0.0, str(error))
    seconds = time.perf_counter() - started if gates.seconds is None else gates.seconds
    ratio = gates.widths.active_ratio(setup.shape)
    assert ratio <= setup.config.active_ratio, (name, ratio)
    gates.attach(setup.base)
    gates.set_on(True)
    ppl = perplexity()
    gates.set_on(False)
    note = f" ({gates.note})" if gates.note else ""
    setup.report(f"{name}: perplexity {ppl:.2f} at {ratio:.4f} active{note}")
    return _row(name, ppl, ratio, gates.tokens, seconds, gates.note)


def _row(
    method: str, ppl: float | None, active_ratio: float | None, tokens: int, seconds: float, note: str = ""
) -> dict[str, Any]:
    return {
        "method": method,
        "ppl": ppl,
        "active_ratio": active_ratio,
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "note": note,
    }


def _print(table: dict[str, Any]) -> None:
    title = (
        f"{table['base']} on {table['text']}, {table['blocks']} x {table['block_size']} tokens, "
        f"at most {table['active_ratio']:g} of the block parameters active"
    )
    dense, lines = table["rows"][0]["ppl"], []
    for row in table["rows"]:
        figures = ["-", "-", "-"]
        if row["ppl"] is not None:
            figures = [f"{row['ppl']:.2f}", f"{row['ppl'] / dense:.2f}", f"{row['active_ratio']:.4f}"]
        lines.append([row["method"], *figures, f"{row['tokens']:,}", f"{row['seconds']:.1f}"])
    print_table(title, ["method", "perplexity", "x dense", "active", "tokens", "seconds"], lines)
