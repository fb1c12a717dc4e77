"""What two processes do on two pretended GPUs: ``torchrun --nproc-per-node 2 -m tests.helpers.two_gpus SETTINGS OUT``.

SETTINGS is a run's settings in JSON. One start does everything, because a start takes ten seconds: a run that is
killed and resumed (OUT/copies), a run with a sharded base (OUT/sharded), and the memory of a sharded base. Each process
writes its findings to OUT/<rank>.json.
"""

import gc
import json
import sys
from pathlib import Path

import tomoe_training.trainer
import torch
import torch.distributed as dist
from tomoe_training.artifacts.export import load_base_config
from tomoe_training.base_model import load_base
from tomoe_training.config import RunConfig, load_run_config
from tomoe_training.trainer import train

from tests.helpers.pretended_gpu import pretended_gpu


class StoppedError(Exception):
    """Stands for a kill."""


def stop_at_step(number: int):
    """A ``_Run._step`` that raises when it comes to ``number``."""
    step = tomoe_training.trainer._Run._step

    def stop(self, model, optimizer, noise, current):
        if current == number:
            raise StoppedError
        step(self, model, optimizer, noise, current)

    return step, stop


def killed_and_resumed(config: RunConfig, out: Path) -> int:
    """The step that the second start resumes from."""
    step, tomoe_training.trainer._Run._step = stop_at_step(3)
    try:
        train(config, out)
    except StoppedError:
        dist.barrier()
    finally:
        tomoe_training.trainer._Run._step = step
    return train(config, out)["resumed_from"]


def peak_of(function, device: torch.device) -> int:
    """Bytes on the device above those of before, at most, while ``function`` runs."""
    before = torch.gpu.memory_allocated(device)
    torch.gpu.reset_peak_memory_stats(device)
    function()
    return torch.gpu.max_memory_allocated(device) - before


def base_memory(folder: Path, device: torch.device, *, is_sharded: bool) -> dict[str, int]:
    """Peaks of loading a base model, and of two tokens' forward and backward pass; bytes of its parts."""
    before, loaded = torch.gpu.memory_allocated(device), []

    def load() -> None:
        loaded.append(
            load_base(folder, load_base_config(folder), torch.float32, device, is_sharded=is_sharded),
        )

    loading = peak_of(load, device)
    held = torch.gpu.memory_allocated(device) - before
    (base,) = loaded
    embeddings = torch.ones(1, 2, base.config.hidden_size, device=device, requires_grad=True)

    def compute() -> None:
        base.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state.sum().backward()

    computing = held + peak_of(compute, device)
    layers = [sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in base.model.layers]
    total = sum(p.numel() * p.element_size() for p in base.parameters())
    gc.collect()  # FSDP keeps the buffers of the last linear in reference cycles
    return {
        "loading": loading,
        "computing": computing,
        "held_after": torch.gpu.memory_allocated(device) - before,
        "layers": sum(layers),
        "largest_layer": max(layers),
        "others": total - sum(layers),
    }


def main() -> None:
    settings, out = json.loads(sys.argv[1]), Path(sys.argv[2])
    config = load_run_config(None, settings, [])
    with pretended_gpu() as device:
        found = {
            "resumed_from": killed_and_resumed(config, out / "copies"),
            "sharded": train(config.model_copy(update={"shard_base": True}), out / "sharded"),
            "copies_memory": base_memory(Path(config.base), device, is_sharded=False),
            "sharded_memory": base_memory(Path(config.base), device, is_sharded=True),
        }
        (out / f"{dist.get_rank()}.json").write_text(json.dumps(found))
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
