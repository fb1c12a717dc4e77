"""Commands that check and measure this machine: doctor, bench, tune."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from tomoe_vllm.cli.app import app, mark_engine_run, print_result

Shape = Annotated[Literal["135m", "1b", "7b-layer"], typer.Option(help="Shape of a random model.")]


@app.command()
def doctor(
    model: Annotated[Path | None, typer.Option(help="Check at the size of this model. Default: LLaMA-2 7B.")] = None,
    interpret: Annotated[
        bool, typer.Option("--interpret", help="Run in Triton's interpreter, without a GPU: tiny sizes, no timing.")
    ] = False,
) -> None:
    """Check and time the GPU kernels on this machine.

    Every kernel is compared with its reference. The exit code is 1 without a GPU, or if a kernel is wrong.
    """
    from tomoe_vllm.diagnostics.doctor import main as run_doctor

    facts, code = run_doctor(model, interpret)
    print_result(facts)
    raise typer.Exit(code)


@app.command()
def bench(
    only: Annotated[
        list[str] | None, typer.Option(help="Only this part: op, decode, prefill or memory; may be repeated.")
    ] = None,
    shape: Shape = "1b",
    model: Annotated[Path | None, typer.Option(help="Dense model to measure instead of a random one.")] = None,
    tomoe: Annotated[
        Path | None, typer.Option(help="ToMoE checkpoint of that model. Default: random gates at a budget of 0.5.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for bench.json and bench.png; must not exist yet.")] = None,
    device: Annotated[
        Literal["cpu", "cuda"] | None, typer.Option(help="Default: the device that the installed vLLM runs on.")
    ] = None,
    order: Annotated[
        Literal["auto", "interleaved", "sequential"],
        typer.Option(
            help="Run both engines at once, alternating, or one after the other. auto: at once if both models fit."
        ),
    ] = "auto",
) -> None:
    """Compare the speed of dense and ToMoE on this machine.

    On a CPU both run in float32; on a GPU in bfloat16, compiled, with CUDA graphs, and a KV cache of equal size.
    """
    from tomoe_vllm.diagnostics.bench.run import bench as run_bench

    facts = run_bench(only, shape, model, tomoe, out, device, order)
    mark_engine_run()
    print_result(facts | {"backend": "vllm"})


@app.command()
def tune(
    out: Annotated[
        Path | None, typer.Option(help="Folder for this GPU's table. Default: the folder the kernels read.")
    ] = None,
    shape: Shape = "7b-layer",
) -> None:
    """Auto-tune the expert-MLP kernel dispatch for this GPU.

    Measures from which number of tokens each kernel is the fastest, and stores these thresholds.
    """
    from tomoe_vllm.diagnostics.bench.shapes import shape_of
    from tomoe_vllm.diagnostics.tune import tune as run_tuning
    from tomoe_vllm.kernels.expert_mlp.triton.dispatch import tuned_folder

    print_result(run_tuning(shape_of(shape), out or tuned_folder()))
