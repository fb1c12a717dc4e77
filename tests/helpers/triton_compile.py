"""Compile for a GPU that is not here exactly what a launch function would launch, and read the result.

Launches are recorded on meta tensors of the real shapes: arguments, specialisation and tile sizes are those
of the code under test, not a copy of them.
"""

import re
import subprocess
import tempfile
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


@dataclass(frozen=True)
class Launch:
    """One recorded ``kernel[grid](*arguments, **constexprs)``."""

    kernel: JITFunction
    grid: tuple[int, ...]
    arguments: tuple
    constexprs: dict
    options: dict


@contextmanager
def recorded_launches(monkeypatch):
    """``with recorded_launches(monkeypatch) as launches:`` no kernel runs; each launch is appended."""
    launches: list[Launch] = []

    def record(kernel, grid):
        def launch(*arguments, **keywords):
            options = {name: keywords.pop(name) for name in OPTIONS if name in keywords}
            launches.append(Launch(kernel, grid, arguments, keywords, options))

        return launch

    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "__getitem__", record)
        yield launches


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for one chip: its pipelined Triton IR, its PTX, and what ptxas says."""

    ttgir: str
    ptx: str
    shared_bytes: int
    arch: int

    def buffers(self, *shape: int) -> set[int]:
        """Depths of the rings in shared memory of bf16 tiles of this shape.

        Not how many steps ahead is loaded: the ring may be there and every copy awaited at once.
        """
        tile = "x".join(map(str, shape))
        pattern = rf"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x{tile}xbf16"
        return {int(depth) for depth in re.findall(pattern, self.ttgir)}

    def steps_ahead(self, *shape: int) -> int:
        """Copies of a bf16 tile of this shape that are under way before the loop starts, per copy in the loop."""
        copy = rf"async_copy_global_to_local .*<{'x'.join(map(str, shape))}xbf16"
        before, loop = (len(re.findall(copy, part)) for part in self.ttgir.split("scf.for", 1))
        return before // loop

    @cached_property
    def async_copies(self) -> Counter:
        """How many asynchronous copies to shared memory the PTX has, by their bytes."""
        pattern = r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (0x\w+|\d+)"
        return Counter(int(size, 0) for size in re.findall(pattern, self.ptx))

    @property
    def tensor_core(self) -> str | None:
        """``wgmma``, ``mma`` or None, by the instruction in the PTX."""
        return "wgmma" if "wgmma.mma_async" in self.ptx else "mma" if "mma.sync" in self.ptx else None

    @cached_property
    def ptxas(self) -> str:
        """``ptxas -v`` on the PTX: registers and spills."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "kernel.ptx"
            source.write_text(self.ptx)
            tool = triton.knobs.nvidia.ptxas if self.arch < 90 else triton.knobs.nvidia.ptxas_blackwell
            command = [tool.path, "-v", f"--gpu-name=sm_{self.arch}{'a' * (self.arch >= 90)}", str(source)]
            result = subprocess.run([*command, "-o", f"{folder}/k.o"], capture_output=True, text=True, check=True)
        return result.stderr

    @property
    def spilled_bytes(self) -> int:
        """Stores and loads of registers that did not fit, per thread."""
        return sum(int(size) for size in re.findall(r"(\d+) bytes spill", self.ptxas))

    @property
    def registers(self) -> int:
        """Of a thread."""
        return int(re.findall(r"Used (\d+) registers", self.ptxas)[0])


def specialization(launch: Launch) -> tuple[dict, dict, dict]:
    """Signature, constants and attributes of the binary that Triton's launcher would use for these arguments.

    Numbers of 1, and that a number or an address is a multiple of 16, are compiled into it, but not for
    arguments marked do_not_specialize.
    """
    names = launch.kernel.arg_names
    signature, constants, attributes = {}, dict(launch.constexprs), {}
    for i, (parameter, value) in enumerate(zip(launch.kernel.params, launch.arguments, strict=False)):
        name, is_special = parameter.name, not parameter.do_not_specialize
        if value is None or (isinstance(value, int) and value == 1 and is_special):
            constants[name] = value
            continue
        is_tensor = isinstance(value, torch.Tensor)
        signature[name] = f"*{TYPES[value.dtype]}" if is_tensor else "i32"
        if is_special and (is_tensor or value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constants, "constexpr")
    return {name: signature[name] for name in names}, constants, attributes


def compile_launch(launch: Launch, arch: int) -> Compiled:
    """Compile for compute capability ``arch`` / 10."""
    source = ASTSource(launch.kernel, *specialization(launch))
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    return Compiled(compiled.asm["ttgir"], compiled.asm["ptx"], compiled.metadata.shared, arch)
