"""Models that the engine checks load: random ones, or the model that was given, dense and as ToMoE."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tomoe_vllm.diagnostics.bench.checkpoints import write_dense, write_tomoe
from tomoe_vllm.diagnostics.bench.shapes import SHAPES, Shape
from tomoe_vllm.diagnostics.full.plan import Options
from tomoe_vllm.diagnostics.tune import layer_kinds
from tomoe_vllm.kernels.expert_mlp.triton.dispatch import Thresholds, write_table

TINY_SHAPE = Shape(
    hidden_size=128, intermediate_size=192, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, vocab_size=512
)

EVERY_PATH = Thresholds(gather_tokens=4, grouped_tokens=256, max_tokens=4096)
"""For the shared layout of the engine checks, so that every kernel runs in an engine. Not measured."""


def make_models(options: Options) -> dict[str, Any]:
    """Write what the engines load to ``scratch/dense`` and ``scratch/tomoe``. ``options.model`` may be either kind."""
    scratch = Path(options.scratch)
    dense, tomoe = scratch / "dense", scratch / "tomoe"
    if options.model is None:
        shape = TINY_SHAPE if options.interpret else SHAPES["1b"]
        write_dense(shape, dense)
        write_tomoe(dense, tomoe)
        facts = {"model": "random, shape tiny" if options.interpret else "random, shape 1b"}
    else:
        facts = _link_models(Path(options.model).resolve(), dense, tomoe)
    for kind in layer_kinds(tomoe, "", 1, "bfloat16"):
        write_table(kind.shape, EVERY_PATH, scratch / "tuned")
    return facts | {"thresholds of the shared layout": asdict(EVERY_PATH)}


def _link_models(model: Path, dense: Path, tomoe: Path) -> dict[str, Any]:
    """The models of a given dense model or ToMoE checkpoint."""
    if json.loads((model / "config.json").read_text())["model_type"].startswith("tomoe_"):
        tomoe.symlink_to(model)
        write_dense_of(model, dense)
        return {"model": model.name, "kind": "ToMoE checkpoint"}
    dense.symlink_to(model)
    write_tomoe(model, tomoe)
    return {"model": model.name, "kind": "dense, with random gates at p = 0.5"}


def write_dense_of(checkpoint: Path, folder: Path) -> None:
    """Write the dense model that is inside a ToMoE checkpoint, with symbolic links to its files."""
    config = json.loads((checkpoint / "config.json").read_text())
    config["model_type"] = config["model_type"].removeprefix("tomoe_")
    config["architectures"] = [name.removeprefix("ToMoE") for name in config["architectures"]]
    config.pop("auto_map", None)
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    weight_map = {name: file for name, file in index["weight_map"].items() if "_gate." not in name}
    folder.mkdir()
    for file in {*weight_map.values(), *(f.name for f in checkpoint.glob("token*"))}:
        (folder / file).symlink_to((checkpoint / file).resolve())
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
