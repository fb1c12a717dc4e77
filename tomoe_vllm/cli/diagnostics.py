"""Commands that check and measure this machine: doctor, bench, tune."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from tomoe_vllm.cli.app import app, mark_engine_run, print_result

Shape = Annotated[Literal["135m", "1b", "7b", "7b-layer"], typer.Option(help="Shape of a random model.")]


@app.command()
def doctor(
    model: Annotated[Path | None, typer.Option(help="Check at the size of this model. Default: LLaMA-2 7B.")] = None,
    interpret: Annotated[
        bool, typer.Option("--interpret", help="Run in Triton's interpreter, without a GPU: tiny sizes, no timing.")
    ] = False,
    full: Annotated[
        bool, typer.Option("--full", help="Also check more shapes, training, and vLLM if it is installed; needs --out.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="With --full: folder of the report; must not exist yet.")] = None,
    minutes: Annotated[float | None, typer.Option(min=0.5, help="With --full: time limit. Default: 8.")] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="With --full: only this part: kernels, engine or training; may be repeated."),
    ] = None,
) -> None:
    """Check and time the GPU kernels on this machine.

    Every kernel is compared with its reference. The exit code is 1 without a GPU, or if a check fails.
    """
    if full:
        if out is None:
            raise ValueError("--full needs --out FOLDER for its report")
        from tomoe_vllm.diagnostics.full.run import full_doctor

        facts, code = full_doctor(
            model, out, interpret=interpret, minutes=8.0 if minutes is None else minutes, only=only or []
        )
    else:
        if out is not None or only or minutes is not None:
            raise ValueError("--out, --only and --minutes are options of --full")
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
    model: Annotated[
        Path | None, typer.Option(help="Measure the layers of this model (dense or ToMoE). Default: --shape.")
    ] = None,
    shape: Shape = "7b-layer",
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="As the server has it.")] = 1,
    dtype: Annotated[
        Literal["bfloat16", "float16"], typer.Option(help="The model's dtype on the server.")
    ] = "bfloat16",
    max_num_batched_tokens: Annotated[
        int, typer.Option(min=8, help="Largest step to measure. Larger ones use the dense path.")
    ] = 8192,
    out: Annotated[
        Path | None, typer.Option(help="Folder for the tables. Default: the folder the kernels read.")
    ] = None,
) -> None:
    """Auto-tune the expert-MLP kernel dispatch for this GPU.

    Measures from which number of tokens each kernel is faster than vLLM's dense MLP, checks its values at each of
    them, and stores these thresholds. The exit code is 1 if a kernel is wrong; it is not used then.
    """
    from tomoe_vllm.diagnostics.tune import layer_kinds
    from tomoe_vllm.diagnostics.tune import tune as run_tuning

    result = run_tuning(layer_kinds(model, shape, tensor_parallel_size, dtype), out, max_num_batched_tokens)
    print_result(result)
    raise typer.Exit(int(any(layer["failures"] for layer in result["layers"])))
