"""Compares the CPU op of several commits. Run: python benchmarks/op_versions.py e3b3fb0 HEAD . --shape 1b --tokens 1 4

The C++ of each commit (``.`` is the working tree) is compiled under a namespace of its own and loaded into one process,
and the calls of all versions, of the dense MLP and of vLLM's fused MoE are interleaved: separate runs on one machine
differ by up to 25 %. Each version is compared with the masked form before it is timed. ``--only-versions`` leaves dense
and fused out. Prints the median and the lower quartile in milliseconds a layer; the last line is JSON.
"""

import argparse
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from tomoe_vllm.diagnostics.bench.measure import interleave, summary
from tomoe_vllm.diagnostics.bench.op import Call, Layer, call_with, check, draw_experts, make_layers, rounds_of, walk
from tomoe_vllm.diagnostics.bench.shapes import SHAPES
from tomoe_vllm.kernels import build as library

ROOT = Path(__file__).resolve().parent.parent
KERNELS = "tomoe_vllm/kernels"
OPS = "prepare_experts", "prepared_expert_mlp", "release_experts"
LIBRARIES: list[torch.library.Library] = []
"""Kept alive: an op is removed together with its library object."""


def sources_of(version: str, folder: Path) -> None:
    """Write the kernels' sources of a commit, or of the working tree, to ``folder``."""
    if version == ".":
        shutil.copytree(ROOT / KERNELS, folder)
        return
    archive = subprocess.run(["git", "archive", version, KERNELS], cwd=ROOT, capture_output=True)
    if archive.returncode:
        sys.exit(f"git has no {KERNELS} of {version!r}: {archive.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder.parent / "archive", filter="data")
    (folder.parent / "archive" / KERNELS).rename(folder)


def build(version: str, name: str, folder: Path) -> Callable[[Layer, Tensor, Tensor], Tensor]:
    """The op of ``version``, registered in the namespace ``name``."""
    sources_of(version, folder / name)
    sources = [f for f in (folder / name).rglob("*.cpp") if "prepare_experts" in f.read_text()]
    if not sources:
        sys.exit(f"{version} has no tomoe::prepare_experts; the oldest commit that can be compared is bb2bae7")
    for file in [*(folder / name).rglob("*.h"), *sources]:
        file.write_text(re.sub(r"\btomoe\b", name, file.read_text()))
    cxx = library.compiler() or sys.exit("no C++ compiler was found")
    library.compile_library(cxx, library.flags_of(), sources, folder / f"{name}.so")
    LIBRARIES.append(torch.library.Library(name, "FRAGMENT"))
    for op in OPS:
        LIBRARIES[-1].define(str(getattr(torch.ops.tomoe, op).default._schema).removeprefix("tomoe::"))
    torch.ops.load_library(folder / f"{name}.so")
    ops = getattr(torch.ops, name)

    @cache
    def handle_of(layer: Layer) -> Tensor:
        return ops.prepare_experts(layer.up, None, layer.down, layer.neuron_ids, layer.widths, "silu")

    return lambda layer, x, ids: ops.prepared_expert_mlp.default(x, ids, handle_of(layer))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="+", help="commits; . is the working tree")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64, 256, 1024])
    parser.add_argument("--only-versions", action="store_true", help="time neither the dense MLP nor the fused MoE")
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    if not library.load():
        sys.exit("the CPU kernels could not be compiled")
    rows = []
    with tempfile.TemporaryDirectory(prefix="tomoe-op-") as folder:
        ops = {v: build(v, f"version{i}", Path(folder)) for i, v in enumerate(arguments.versions)}
    others = {} if arguments.only_versions else {"dense": Layer.dense, "fused": Layer.fused}
    layers = make_layers(shape, tuple(others))
    generator = torch.Generator().manual_seed(1)
    for num_tokens in arguments.tokens:
        x = torch.randn(num_tokens, shape.hidden_size, generator=generator)
        draws = draw_experts(shape.num_experts, num_tokens, generator)
        calls: dict[str, Call] = {name: call_with(op, x, draws) for name, op in (others | ops).items()}
        check(calls | {"masked": call_with(Layer.masked, x, draws)}, layers[0])
        samples = interleave(walk(calls, layers), rounds=rounds_of(shape, num_tokens), warm_up=2)
        row = {name: summary(values, 1e3) for name, values in samples.items()}
        rows.append({"num_tokens": num_tokens, "ms": row})
        parts = [f"{name} {value['median']:.4f} ({value['low']:.4f})" for name, value in row.items()]
        print(f"{num_tokens:>5} tokens: {', '.join(parts)} ms", file=sys.stderr, flush=True)
    print(json.dumps({"shape": arguments.shape, "num_threads": torch.get_num_threads(), "rows": rows}))


if __name__ == "__main__":
    main()
