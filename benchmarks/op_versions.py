"""Is the CPU op faster than it was? Run: python benchmarks/op_versions.py 4fcd983 HEAD . --shape 1b --tokens 4 16 256

The C++ of each commit (``.`` is the working tree) is built under a name of its own, and all of them, the dense MLP and
vLLM's fused MoE are called in turn in one process: runs differ by a quarter on the same machine, turns do not. Each
version is compared with the masked form before it is timed. Milliseconds a layer, medians; the last line is JSON.
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
from tomoe_vllm.kernels.expert_mlp.weight_layout import PANEL_WIDTHS, empty_panels, empty_rows

ROOT = Path(__file__).resolve().parent.parent
KERNELS = "tomoe_vllm/kernels"
OP, PREPARED = "expert_mlp", "prepared_expert_mlp"
OPS = OP, "prepare_experts", PREPARED


def sources_of(version: str, folder: Path) -> None:
    """The kernels' folder of a commit, or of the working tree, as ``folder``."""
    if version == ".":
        shutil.copytree(ROOT / KERNELS, folder)
        return
    archive = subprocess.run(["git", "archive", version, KERNELS], cwd=ROOT, capture_output=True)
    if archive.returncode:
        sys.exit(f"git knows no {KERNELS} of {version!r}: {archive.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder.parent / "archive", filter="data")
    (folder.parent / "archive" / KERNELS).rename(folder)


def build(version: str, name: str, folder: Path) -> Callable[[Layer, Tensor, Tensor], Tensor]:
    """The op of ``version``, registered under ``name`` with the schemas of today's ops."""
    sources_of(version, folder / name)
    sources = [folder / name / OP / "cpu.cpp"]
    for file in [*(folder / name).rglob("*.h"), *sources]:
        file.write_text(re.sub(r"\btomoe\b", name, file.read_text()))
    cxx = library.compiler() or sys.exit("no C++ compiler was found")
    library.compile_library(cxx, library.flags_of(), sources, folder / f"{name}.so")
    LIBRARIES.append(torch.library.Library(name, "FRAGMENT"))
    for op in OPS:
        LIBRARIES[-1].define(str(getattr(torch.ops.tomoe, op).default._schema).removeprefix("tomoe::"))
    torch.ops.load_library(folder / f"{name}.so")
    ops = getattr(torch.ops, name)
    takes_panels = "panel" in (folder / name / OP / "problem.h").read_text()
    widest = re.search(r"kPanelColumns = (\d+)", (folder / name / OP / "down.h").read_text())
    widths = tuple(width for width in PANEL_WIDTHS if takes_panels and widest and width <= int(widest[1]))
    if PREPARED in sources[0].read_text():

        @cache
        def prepared(layer: Layer) -> Tensor:
            down = down_of(layer, widths)
            return ops.prepare_experts(layer.up, None, down, layer.neuron_ids, layer.widths, "silu")

        return lambda layer, x, ids: ops.prepared_expert_mlp.default(x, ids, prepared(layer))

    def call(layer: Layer, x: Tensor, ids: Tensor) -> Tensor:
        down = down_of(layer, widths)
        return ops.expert_mlp.default(
            x, ids, layer.up, None, down, layer.masks, layer.neuron_ids, layer.widths, "silu", 0, 1
        )

    return call


@cache
def down_of(layer: Layer, widths: tuple[int, ...]) -> Tensor:
    """W_down of a layer in the widest panels that a version takes; before 2026-11-26 one row per neuron."""
    weights = layer.down.flatten(1)
    if not widths:
        return empty_rows(*weights.shape).copy_(weights)
    panels = empty_panels(*weights.shape, widths)
    return layer.down if panels.shape == layer.down.shape else panels.copy_(weights.unflatten(1, panels.shape[1:]))


LIBRARIES: list[torch.library.Library] = []
"""Kept: an op is gone with its library."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="+", help="commits; . is the working tree")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16, 64, 256, 1024])
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    if not library.load():
        sys.exit("the CPU kernels could not be compiled")
    rows = []
    with tempfile.TemporaryDirectory(prefix="tomoe-op-") as folder:
        ops = {v: build(v, f"version{i}", Path(folder)) for i, v in enumerate(arguments.versions)}
    layers = make_layers(shape, ("dense", "fused"))
    generator = torch.Generator().manual_seed(1)
    for num_tokens in arguments.tokens:
        x = torch.randn(num_tokens, shape.hidden_size, generator=generator)
        draws = draw_experts(shape.num_experts, num_tokens, generator)
        ways = {"dense": Layer.dense, "fused": Layer.fused} | ops
        calls: dict[str, Call] = {name: call_with(way, x, draws) for name, way in ways.items()}
        check(calls | {"masked": call_with(Layer.masked, x, draws)}, layers[0])
        samples = interleave(walk(calls, layers), rounds=rounds_of(shape, num_tokens), warm_up=2)
        row = {name: summary(values, 1e3) for name, values in samples.items()}
        rows.append({"num_tokens": num_tokens, "ms": row})
        parts = [f"{name} {value['median']:.3f} (from {value['low']:.3f})" for name, value in row.items()]
        print(f"{num_tokens:>5} tokens: {', '.join(parts)} ms", file=sys.stderr, flush=True)
    print(json.dumps({"shape": arguments.shape, "num_threads": torch.get_num_threads(), "rows": rows}))


if __name__ == "__main__":
    main()
