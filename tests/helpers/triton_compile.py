"""Compile for a GPU that is not here exactly what a launch function would launch, and read the result.

Launches are recorded on meta tensors of the real shapes: arguments, specialisation and tile sizes are those
of the code under test, not a copy of them.
"""

import re
import subprocess
import tempfile
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
        """Depths of the shared-memory rings of tiles of this shape: local_alloc of DEPTH x shape x bf16."""
        tile = "x".join(map(str, shape))
        return {
            int(depth) for depth in re.findall(rf"local_alloc : \(\) -> !ttg\.memdesc<(\d+)x{tile}xbf16", self.ttgir)
        }

    @cached_property
    def async_copies(self) -> dict[str, set[int]]:
        """Bytes of the asynchronous copies to shared memory in the PTX."""
        return {
            int(size, 0)
            for size in re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (0x\w+|\d+)", self.ptx)
        }

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
        return sum(int(size) for size in re.findall(r"(\d+) bytes spill", self.ptxas))

    @property
    def registers(self) -> int:
        return int(re.search(r"Used (\d+) registers", self.ptxas).group(1))


def compile_launch(launch: Launch, arch: int) -> Compiled:
    """Compile as Triton's launcher would on compute capability ``arch``: sizes of 1 and multiples of 16 are known."""
    names = launch.kernel.arg_names
    signature, constexprs, attributes = {}, dict(launch.constexprs), {}
    for i, (name, value) in enumerate(zip(names, launch.arguments, strict=False)):
        if value is None or (isinstance(value, int) and value == 1):
            constexprs[name] = value
            continue
        is_tensor = isinstance(value, torch.Tensor)
        signature[name] = f"*{TYPES[value.dtype]}" if is_tensor else "i32"
        if is_tensor or value % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constexprs, "constexpr")
    source = ASTSource(launch.kernel, {n: signature[n] for n in names}, constexprs, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    return Compiled(compiled.asm["ttgir"], compiled.asm["ptx"], compiled.metadata.shared, arch)
