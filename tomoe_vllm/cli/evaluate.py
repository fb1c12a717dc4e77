"""Commands that measure quality: eval ppl, eval tasks, eval compare."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tomoe_vllm.cli.app import app, mark_engine_run, print_result
from tomoe_vllm.cli.options import (
    TYPER,
    Assignments,
    Backend,
    Base,
    BlockSize,
    ConfigFile,
    Dtype,
    MaxBlocks,
    Model,
    settings_command,
)

evaluation = typer.Typer(no_args_is_help=True, **TYPER)
app.add_typer(
    evaluation,
    name="eval",
    help="Measure perplexity and downstream tasks.",
)


@evaluation.command("ppl")
def eval_ppl(
    model: Model,
    text: Annotated[Path, typer.Option(help="Plain text file.")],
    block_size: BlockSize = 1024,
    max_blocks: MaxBlocks = 40,
    backend: Backend = "hf",
    dtype: Dtype = "auto",
    record: Annotated[
        bool, typer.Option("--record", help="Also write the result into the checkpoint's README.md.")
    ] = False,
) -> None:
    """Measure the perplexity of a text.

    The text is cut into non-overlapping blocks, each scored on its own; perplexity is per token.
    """
    from tomoe_training.artifacts.model_card import record_perplexity
    from tomoe_training.evaluation.perplexity import evaluate_perplexity

    facts = evaluate_perplexity(model, text, backend=backend, block_size=block_size, max_blocks=max_blocks, dtype=dtype)
    if record:
        record_perplexity(model, facts)
    if backend == "vllm":
        mark_engine_run()
    print_result(facts)


@evaluation.command("tasks")
def eval_tasks(
    model: Model,
    tasks: Annotated[
        str, typer.Option(help="Names of lm-eval separated by commas, or zero-shot, few-shot or generation.")
    ],
    backend: Backend = "hf",
    task_folder: Annotated[Path | None, typer.Option(help="Folder with your own task YAML files.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(help="Examples in the prompt. Default: those the task defines.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Evaluate only this many rows of each task.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Batch size for hf (default: 8); vllm ignores it.")] = None,
    dtype: Dtype = "auto",
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Format prompts with the model's chat template.")
    ] = False,
) -> None:
    """Evaluate downstream tasks with lm-eval.

    Needs the extra `eval`.
    """
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
    if backend == "vllm":
        mark_engine_run()
    print_table(
        f"{model} ({backend}, {facts['dtype']})",
        ["task", "shots", "rows", "metric", "value"],
        score_rows(facts["tasks"]),
    )
    print_result(facts)


@settings_command(evaluation, "tomoe_training.config:RunConfig", only=("data", "active_ratio", "steps"))
def compare(
    flags: dict[str, Any],
    base: Base,
    text: Annotated[Path, typer.Option(help="Plain text file to measure on.")],
    adapter: Annotated[
        Path | None,
        typer.Option(help="ToMoE adapter, whose training settings become the defaults. Default: train one."),
    ] = None,
    method: Annotated[list[str] | None, typer.Option(help="Only this method; may be repeated.")] = None,
    block_size: BlockSize = 1024,
    max_blocks: MaxBlocks = 40,
    work: Annotated[
        Path | None, typer.Option(help="Folder that keeps trained adapters, so that a comparison can be resumed.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the table; must not exist yet.")] = None,
    config: ConfigFile = None,
    set_: Assignments = None,
) -> None:
    """Compare ToMoE with baseline methods by perplexity.

    All methods get the same model, training text, number of tokens and budget.
    """
    from tomoe_training.evaluation.compare import compare as run_comparison
    from tomoe_training.evaluation.compare import comparison_config

    run = comparison_config(config, adapter, {"base": str(base)} | flags, set_ or [])
    print_result(
        run_comparison(
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
