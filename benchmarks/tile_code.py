"""Machine code of the CPU micro-kernels. Run: python benchmarks/tile_code.py --isa AVX512

Compiles the kernels and runs none of them, so the instruction set may be that of another CPU. For the innermost loop of
each micro-kernel: the number of multiply-adds, and of accesses to vectors on the stack, which are sums that found no
register. With llvm-mca (Debian: llvm) also the cycles of one iteration by its model of ``--cpu``, with operands in L1.
The last line is JSON.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from tomoe_vllm.kernels import build

REGISTERS = {"AVX512": "%zmm", "AVX2": "%ymm"}
CPUS = {"AVX512": "icelake-server", "AVX2": "haswell"}
"""Models of llvm-mca with two units for multiply-adds."""
ITERATIONS = 1000


@dataclass(frozen=True)
class Loop:
    """The shortest innermost loop of a micro-kernel, which handles whole vectors."""

    tile: str
    multiply_adds: int
    on_stack: int
    instructions: int
    cycles: float | None


def functions_of(library: Path) -> Iterator[tuple[str, list[tuple[int, str]]]]:
    """Demangled names and (address, instruction) of the functions of ``library``."""
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", str(library)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for name, body in re.findall(r"^[0-9a-f]+ <(.*)>:\n((?:.+\n)*)", text, re.MULTILINE):
        lines = re.findall(r"^\s*([0-9a-f]+):\s+(.*?)\s*(?:<.*)?$", body, re.MULTILINE)
        yield name, [(int(address, 16), instruction) for address, instruction in lines]


def innermost_loops(instructions: list[tuple[int, str]]) -> list[list[str]]:
    """Instructions from the target of a backward jump to the jump, where they contain no other such loop."""
    index = {address: i for i, (address, _) in enumerate(instructions)}
    loops = []
    for end, (_, instruction) in enumerate(instructions):
        if (jump := re.match(r"j\w+\s+([0-9a-f]+)$", instruction)) and index.get(int(jump[1], 16), end + 1) <= end:
            loops.append((index[int(jump[1], 16)], end))
    inner = [s for s in loops if not any(s != t and s[0] <= t[0] and t[1] <= s[1] for t in loops)]
    return [[instruction for _, instruction in instructions[begin : end + 1]] for begin, end in inner]


def cycles_of(loop: list[str], cpu: str) -> float | None:
    """Cycles of one iteration by llvm-mca's model of ``cpu``; None without llvm-mca."""
    if not (analyzer := shutil.which("llvm-mca")):
        return None
    code = "\n".join([".begin:", *(re.sub(r"^(j\w+)\s.*", r"\1 .begin", instruction) for instruction in loop), ""])
    command = [analyzer, f"-mcpu={cpu}", f"-iterations={ITERATIONS}"]
    result = subprocess.run(command, input=code, capture_output=True, text=True)
    if not (total := re.search(r"Total Cycles:\s+(\d+)", result.stdout)):
        sys.exit(f"llvm-mca failed: {result.stderr.strip().splitlines()[0]}")
    return int(total[1]) / ITERATIONS


def tiles_of(isa: str, cpu: str) -> list[Loop]:
    """The loops of all micro-kernels, compiled for ``isa``."""
    register, tiles = REGISTERS[isa], {}
    for name, instructions in functions_of(build.build(isa)):
        tile = re.match(r"void tomoe::(\w+_tile<[^>]*>)", name)
        loops = [loop for loop in innermost_loops(instructions) if any("vfmadd" in i and register in i for i in loop)]
        if tile and loops and tile[1] not in tiles:
            loop = min(loops, key=len)
            stack = [i for i in loop if register in i and re.search(r"\(%r[sb]p", i)]
            fmas = sum("vfmadd" in i and register in i for i in loop)
            tiles[tile[1]] = Loop(tile[1], fmas, len(stack), len(loop), cycles_of(loop, cpu))
    return sorted(tiles.values(), key=lambda loop: loop.tile)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = torch.backends.cpu.get_cpu_capability()
    parser.add_argument("--isa", choices=REGISTERS, default=here if here in REGISTERS else "AVX2")
    parser.add_argument("--cpu", help="a CPU model of llvm-mca (default: one with that instruction set)")
    arguments = parser.parse_args()
    if not shutil.which("objdump"):
        sys.exit("objdump was not found; install binutils")
    cpu = arguments.cpu or CPUS[arguments.isa]
    try:
        loops = tiles_of(arguments.isa, cpu)
    except build.BuildError as error:
        sys.exit(str(error))
    for loop in loops:
        rate = f", {loop.cycles:.1f} cycles, {loop.multiply_adds / loop.cycles:.2f} a cycle" if loop.cycles else ""
        print(
            f"{loop.tile:<32} {loop.multiply_adds:>2} multiply-adds, {loop.on_stack} on the stack{rate}",
            file=sys.stderr,
        )
    print(json.dumps({"isa": arguments.isa, "cpu": cpu, "tiles": [asdict(loop) for loop in loops]}))


if __name__ == "__main__":
    main()
