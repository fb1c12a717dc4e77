"""The checks of ``tomoe doctor --full``, most valuable first."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tomoe_vllm.diagnostics.doctor import SOME_TOKENS
from tomoe_vllm.diagnostics.layers import LLAMA, MAX_GATHER_TOKENS, PATHS, PHI, TINY, TINY_PHI, LayerSizes, layer_of
from tomoe_vllm.diagnostics.tune import NUM_TOKENS

PARTS = ("kernels", "engine", "training")
TENSOR_PARALLEL = (2, 4, 8)
FEW_TOKENS = (1, 2, 3, 8, 128, 1024, 4096)
"""For shapes that differ from the first one in size only."""
OPS = ("route", "mask_values", "activation")
ENGINE_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the profiler and the checks of the worker need its process
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "INFO",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What a run was asked for. ``interpret``: on a CPU, in Triton's interpreter, with tiny sizes."""

    model: str | None = None
    interpret: bool = False
    scratch: str = ""

    def layers(self) -> dict[str, LayerSizes]:
        """The layers that are checked, by name: the first one in all dtypes and sizes."""
        if self.interpret:
            first, *others = TINY, TINY_PHI
            shares = [first.share(2)]
        else:
            first, *others = (layer_of(Path(self.model)) if self.model else LLAMA), PHI
            shares = [first.share(ranks) for ranks in TENSOR_PARALLEL]
        return {layer.name: layer for layer in (first, *shares, *others) if layer is not None}


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One unit of work of a child process: a crash loses no more than it.

    ``process``: consecutive jobs with the same name run in one process. ``limit_s``: it is stopped after this time.
    ``environment``: variables of the process.
    """

    part: str
    name: str
    kind: str
    process: str
    limit_s: float
    arguments: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


def make_plan(options: Options, parts: tuple[str, ...] = PARTS) -> list[Job]:
    """All jobs of ``parts``, in the order in which they are worth the time.

    The kernels of one layer and the first engines come before more shapes and layouts.
    """
    first, *others = options.layers().values()
    stages = {
        "kernels": (_first_kernels(options, first), _more_kernels(options, first, others)),
        "engine": (_engines(options, ("dense", "masked", "shared")), _engines(options, ("observer", "fused"))),
        "training": (_training(options), iter(())),
    }
    order = ("kernels", 0), ("engine", 0), ("training", 0), ("kernels", 1), ("engine", 1)
    return [job for part, stage in order if part in parts for job in stages[part][stage]]


def _kernel_job(options: Options, kind: str, name: str, **arguments: Any) -> Job:
    return Job(
        part="kernels",
        name=name,
        kind=kind,
        process="kernels",
        limit_s=60,  # the first call of a kernel compiles it, in seconds
        arguments=arguments,
        environment={"TRITON_INTERPRET": "1"} if options.interpret else {},
    )


def _ops(options: Options, layer: LayerSizes, dtype: str, counts: tuple[int, ...]) -> Iterator[Job]:
    """All kernels of a layer at these numbers of tokens."""
    for path in (*PATHS, *OPS):
        for count in counts:
            if path == "gather" and count > MAX_GATHER_TOKENS:
                continue
            name = f"{path}, {count} tokens, {dtype}, {layer.name}"
            arguments = {"layer": layer.name, "dtype": dtype, "path": path, "num_tokens": count, "routing": "random"}
            yield _kernel_job(options, "kernel", name, **arguments)


def _first_kernels(options: Options, layer: LayerSizes) -> Iterator[Job]:
    if not options.interpret:
        yield _kernel_job(options, "rates", "rates of the device")
    dtype, counts = ("float32", (1, 3, 20)) if options.interpret else ("bfloat16", NUM_TOKENS)
    yield from _ops(options, layer, dtype, counts)
    for path in PATHS:
        count = max(n for n in counts if path != "gather" or n <= MAX_GATHER_TOKENS)
        name = f"{path}, {count} tokens on one expert, {dtype}, {layer.name}"
        arguments = {"layer": layer.name, "dtype": dtype, "path": path, "num_tokens": count}
        yield _kernel_job(options, "kernel", name, routing="one expert", **arguments)


def _more_kernels(options: Options, first: LayerSizes, others: list[LayerSizes]) -> Iterator[Job]:
    if options.interpret:
        yield from _ops(options, first, "float16", (3,))
        for layer in others:
            yield from _ops(options, layer, "float32", (3,))
        return
    for layer in others:
        yield from _ops(options, layer, "bfloat16", FEW_TOKENS if "TP" in layer.name else NUM_TOKENS)
    for dtype in ("float16", "float32"):
        yield from _ops(options, first, dtype, SOME_TOKENS)


def _training(options: Options) -> Iterator[Job]:
    def job(name: str, kind: str, **environment: str) -> Job:
        return Job(part="training", name=name, kind=kind, process=name, limit_s=120, environment=environment)

    yield job("training steps, device and CPU", "training steps")
    yield job("tomoe train, CPU", "train on cpu", ACCELERATE_USE_CPU="true", CUDA_VISIBLE_DEVICES="")
    yield job("tomoe train, device", "train on device")


def _engines(options: Options, names: tuple[str, ...]) -> Iterator[Job]:
    scratch = Path(options.scratch)
    folders = {"VLLM_CACHE_ROOT": str(scratch / "vllm"), "TOMOE_TUNED_CONFIG_FOLDER": str(scratch / "tuned")}

    def job(name: str, kind: str, limit_s: float, **arguments: str) -> Job:
        return Job(
            part="engine",
            name=name,
            kind=kind,
            process=name,
            limit_s=limit_s,
            arguments=arguments,
            environment=ENGINE_ENVIRONMENT | folders,
        )

    if "dense" in names:
        yield job("models of the engine checks", "models", 120)
    for name in names:
        yield job(f"vLLM, {name}", "engine", 180, layout=name)


def write_jobs(jobs: list[Job], options: Options, file: Path) -> None:
    """Write what a child process reads."""
    file.write_text(json.dumps({"options": asdict(options), "jobs": [asdict(job) for job in jobs]}))


def read_jobs(file: Path) -> tuple[list[Job], Options]:
    """The inverse of :func:`write_jobs`."""
    content = json.loads(file.read_text())
    return [Job(**job) for job in content["jobs"]], Options(**content["options"])


def has_vllm() -> bool:
    """Whether vLLM is installed; it is not imported."""
    return find_spec("vllm") is not None


def process_environment(job: Job, options: Options) -> dict[str, str]:
    """Variables of the process of ``job``. TRITON_INTERPRET is for the kernels only."""
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "ACCELERATE_USE_CPU")
    }
    return inherited | ({"CUDA_VISIBLE_DEVICES": ""} if options.interpret else {}) | job.environment
