"""Fine-tuning of a converted model as a dense model under masks (the pseudo-MoE of appendix B.3).

A token's expert computes with the neurons that it keeps, ``down[:, kept] (act(gate[kept] x) * up[kept] x)``. This
equals the dense MLP with masked hidden neurons. The exported checkpoint, loaded as the reference model, is
therefore trained like any dense model: gates on, routers and masks frozen, next-token loss. The dense tensors
are updated: by LoRA (PEFT) on every linear of the decoder blocks, merged at the end, or directly. The result is a
checkpoint with byte-identical masks, which Hugging Face and vLLM load like the original.

PEFT wraps a linear, and hooks stay on the inner linear. The gates are therefore attached again after wrapping:
they then also mask the input and output of the low-rank part, and merging changes only rounding.

A killed run leaves no output and cannot be resumed. The same seed gives the same bits on the same CPU.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import get_scheduler

from tomoe_training.artifacts.atomic import atomic_folder, link_or_copy
from tomoe_training.artifacts.inspection import inspect
from tomoe_training.artifacts.model_card import fine_tuned_card
from tomoe_training.artifacts.provenance import provenance
from tomoe_training.artifacts.safetensors_io import (
    StoredTensor,
    fingerprint_of,
    read_header,
    stored_tensors,
    write_tensors,
)
from tomoe_training.artifacts.tokenizer_files import load_tokenizer
from tomoe_training.base_model import use_causal_attention
from tomoe_training.config import LEARNING_RATES, FinetuneConfig
from tomoe_training.data import InterleavedBlocks, pack
from tomoe_training.documents import load_documents
from tomoe_training.dtypes import default_device, has_fast_bfloat16, to_device
from tomoe_training.evaluation.perplexity import load_model
from tomoe_training.method.losses import language_model_loss
from tomoe_training.progress import TrainProgress

WARMUP_SHARE = 0.03
MAX_GRAD_NORM = 1.0
READ_EVERY = 10
"""Steps between two readings of the loss, each of which waits for the device."""
PROVENANCE = "tomoe_provenance.json"
GATES = ("head_gate", "expert_gate")


def finetune(checkpoint: Path, config: FinetuneConfig, out: Path) -> dict[str, Any]:
    """Fine-tune a ToMoE checkpoint and write the result to ``out``, atomically. Returns a summary.

    Raises ``ValueError`` for bad input and ``FloatingPointError`` for a loss that is not finite.
    """
    if not config.data:
        raise ValueError("no training data: give --data FILE [FILE ...]")
    if inspect(checkpoint)["kind"] != "checkpoint":
        raise ValueError(f"{checkpoint} is an adapter; give the checkpoint that tomoe export wrote from it")
    tensors = stored_tensors(checkpoint)
    with atomic_folder(out) as folder:  # first: an existing folder is refused before training
        tokenizer = load_tokenizer(checkpoint)
        packed = [
            pack(load_documents(source, config.text_column, tokenizer), tokenizer, config.sequence_length, source)
            for source in config.data
        ]
        device = default_device()
        # Full weights need float32 masters: a step of 2e-5 is below the precision of bfloat16.
        is_half = config.method == "lora" and has_fast_bfloat16(device)
        model = load_model(checkpoint, torch.bfloat16 if is_half else torch.float32).to(device)
        trained = prepare(model, config)
        started = time.perf_counter()
        losses = train_steps(model, trained, InterleavedBlocks(packed, config.seed), config)
        facts = {
            **config.model_dump(),
            "data": [Path(source).name for source in config.data],
            "learning_rate": config.learning_rate or LEARNING_RATES[config.method],
            "dtype": "bfloat16" if is_half else "float32",
            "trained_parameters": sum(parameter.numel() for parameter in trained),
            "tokens": config.steps * config.batch_size * config.sequence_length,
            "seconds": round(time.perf_counter() - started, 1),
            "first_loss": _mean(losses[: max(1, len(losses) // 10)]),
            "final_loss": _mean(losses[-max(1, len(losses) // 10) :]),
        }
        write_weights(tensors, updates_of(model, config.method), folder)
        facts |= {
            "source_dense_hash": fingerprint_of(_dense(tensors)),
            "dense_hash": fingerprint_of(_dense(_written(tensors, folder))),
        }
        _write_other_files(checkpoint, facts, folder)
    keys = ("method", "steps", "tokens", "seconds", "trained_parameters", "first_loss", "final_loss", "dense_hash")
    return {"checkpoint": str(out)} | {key: facts[key] for key in keys}


def prepare(model, config: FinetuneConfig) -> list[nn.Parameter]:
    """Make a reference model trainable, with frozen gates. Returns the trained parameters in a fixed order.

    With ``lora``, PEFT's layers are added and the gates attached to them.
    """
    model.requires_grad_(False)
    if config.method == "full":
        trained = [p for name, p in model.named_parameters() if not _is_gate(name)]
    else:
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("tomoe finetune needs peft: pip install './tomoe-vllm[train]'") from error
        lora = LoraConfig(
            r=config.rank, lora_alpha=config.alpha, lora_dropout=0.0, bias="none", target_modules=block_linears(model)
        )
        with _seeded(config.seed):
            inject_adapter_in_model(lora, model)
        model.attach_gates()
        trained = [p for name, p in model.named_parameters() if "lora_" in name]
        for parameter in trained:
            parameter.data = parameter.data.float()
    for parameter in trained:
        parameter.requires_grad_(True)
    return trained


def block_linears(model) -> list[str]:
    """Names of the linears of a decoder block, without those of the gates: q_proj, ..., down_proj."""
    found = (name for name, module in model.model.layers.named_modules() if isinstance(module, nn.Linear))
    return sorted({name.rpartition(".")[2] for name in found if not _is_gate(name)})


def train_steps(model, trained: list[nn.Parameter], blocks: InterleavedBlocks, config: FinetuneConfig) -> list[float]:
    """Train with the next-token loss on all tokens of all blocks. Returns the loss of each step, nats per token."""
    optimizer = torch.optim.AdamW(
        trained, lr=config.learning_rate or LEARNING_RATES[config.method], weight_decay=0.0
    )  # fmt: skip
    scheduler = get_scheduler(
        "cosine", optimizer, num_warmup_steps=math.ceil(WARMUP_SHARE * config.steps), num_training_steps=config.steps
    )
    use_causal_attention(model, config.sequence_length)
    losses: list[float] = []
    unread: list[Tensor] = []
    started = time.perf_counter()
    with TrainProgress(config.steps, 0, is_on=True) as progress:
        for step in range(config.steps):
            ids = to_device(blocks.batch(step, range(config.batch_size), config.batch_size), model.device)
            loss = loss_of(model, ids)
            loss.backward()
            nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            unread.append(loss.detach())
            progress.advance(step + 1)
            if len(unread) == READ_EVERY or step + 1 == config.steps:
                losses += _read_losses(unread, len(losses))
                unread.clear()
                tokens_per_s = len(losses) * ids.numel() / (time.perf_counter() - started)
                progress.show(step + 1, f"loss {losses[-1]:.4f}; {tokens_per_s:.0f} tokens/s")
    return losses


def _read_losses(losses: list[Tensor], first_step: int) -> list[float]:
    """Copy losses from the device, which waits for it. Raises ``FloatingPointError`` if one is not finite."""
    values = torch.stack(losses).tolist()
    for step, value in enumerate(values, start=first_step + 1):
        if not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value} at step {step}; lower --learning-rate")
    return values


def loss_of(model, ids: Tensor) -> Tensor:
    """Mean cross-entropy of the next tokens of ``ids`` [B, S], nats."""
    hidden = model.model(ids, use_cache=False).last_hidden_state
    return language_model_loss(hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), model.lm_head)


def updates_of(model, method: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """For each tensor name, the function from the stored tensor to its fine-tuned value (float32, on the CPU)."""
    if method == "full":
        dense = {name: tensor for name, tensor in model.state_dict().items() if not _is_gate(name)}
        return {name: partial(_replaced, tensor) for name, tensor in dense.items()}
    from peft.tuners.lora import LoraLayer

    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    return {f"{name}.weight": partial(_merged, layer) for name, layer in layers.items()}


def _replaced(new: Tensor, stored: Tensor) -> Tensor:
    return new.float().cpu()


def _merged(layer, stored: Tensor) -> Tensor:
    return stored.float() + layer.get_delta_weight("default").float().cpu()


@torch.no_grad()
def write_weights(
    tensors: dict[str, StoredTensor], updates: dict[str, Callable[[Tensor], Tensor]], folder: Path
) -> None:
    """Write a checkpoint's shards: those with updated tensors in the stored dtype; the others are hard-linked."""
    unknown = updates.keys() - tensors.keys()
    tied = {"lm_head.weight"}  # tied: stored only under the name of the embedding
    if unknown - tied:
        raise ValueError(f"the checkpoint has no tensor {min(unknown - tied)} to update; export it again")
    for file in sorted({tensor.file for tensor in tensors.values()}):
        names = [name for name, tensor in tensors.items() if tensor.file == file]
        if not updates.keys() & set(names):
            link_or_copy(file, folder / file.name)
            continue
        values = load_file(file)
        for name in updates.keys() & set(names):
            values[name] = updates[name](values[name]).to(values[name].dtype).contiguous()
        write_tensors(values, folder / file.name)


def _write_other_files(checkpoint: Path, facts: dict, folder: Path) -> None:
    for file in checkpoint.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copyfile(file, folder / file.name)
        elif file.name == "additional_chat_templates":
            shutil.copytree(file, folder / file.name)
    card = folder / "README.md"
    text = card.read_text() if card.is_file() else "# ToMoE checkpoint\n"
    card.write_text(fine_tuned_card(text, facts))
    record = folder / PROVENANCE
    details = json.loads(record.read_text()) if record.is_file() else {}
    runs = [*details.get("finetuning", []), facts | {"provenance": provenance()}]
    record.write_text(json.dumps(details | {"finetuning": runs}, indent=2) + "\n")


def _written(tensors: dict[str, StoredTensor], folder: Path) -> dict[str, StoredTensor]:
    """Tensors of ``folder``, which has no config.json yet."""
    files = {folder / tensor.file.name for tensor in tensors.values()}
    return {name: tensor for file in files for name, tensor in read_header(file).items()}


def _dense(tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    return {name: tensor for name, tensor in tensors.items() if not _is_gate(name)}


def _is_gate(name: str) -> bool:
    return any(gate in name for gate in GATES)


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed PyTorch's global generator, and restore its state afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
