"""The training loop: a frozen base, a student of gates, self-distillation.

Everything a step does follows from (config, step): the batch, the noise, the learning rate. A checkpoint is
therefore small (modules, optimiser, step), and a run killed at any point and started again with the same
command ends with the same weights.

An output folder holds ``run/`` (resolved config, provenance, metrics, checkpoint) from the start, and the
adapter's two files once training is over.
"""

import contextlib
import dataclasses
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

from tomoe_training.artifacts.adapter import ADAPTER_CONFIG, Adapter, AdapterConfig
from tomoe_training.artifacts.atomic import write_json
from tomoe_training.artifacts.export import check_base, load_base_config
from tomoe_training.artifacts.provenance import provenance
from tomoe_training.artifacts.safetensors_io import fingerprint, stored_tensors
from tomoe_training.artifacts.training_state import load_state, save_state
from tomoe_training.budget import Widths
from tomoe_training.config import RunConfig
from tomoe_training.data import InterleavedBlocks, load_documents, pack, sample_from_model
from tomoe_training.dtypes import training_dtype
from tomoe_training.method.relaxation import NoiseSource
from tomoe_training.method.student import Student
from tomoe_training.process_setup import hide_progress_bars, release_memory
from tomoe_training.progress import TrainProgress
from tomoe_training.warm_start.initialization import warm_start
from tomoe_vllm.hf.configuration_tomoe import base_model_type

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.jsonl"
SELF_TEXT = "self.jsonl"
RUN_CONFIG = "config.yaml"
SELF_TEXT_LENGTH = 256
"""Tokens of one text sampled from the dense model: decoding is serial, so short texts in a batch are quick."""
# Settings a resumed run may change without becoming another run.
MAY_CHANGE = {"log_every", "checkpoint_every", "tensorboard", "notes"}


def train(config: RunConfig, out: Path) -> dict[str, Any]:
    """Train (or resume) a run and write its adapter to ``out``. Returns a JSON-ready summary.

    Runs unchanged under ``torchrun`` and ``accelerate launch``; ``batch_size`` is over all processes.
    Raises ``ValueError`` for bad input and ``FloatingPointError`` for a loss that is not finite.
    """
    return _Run(config, out).run()


def make_optimizer(config: RunConfig, student: Student) -> torch.optim.AdamW:
    """AdamW over what is trained, the offsets in a group of their own."""
    trained = {n: p for n, p in student.named_parameters() if p.requires_grad}
    # Decay would pull the warm start's logits to the threshold; everything else decays, as published.
    free = [p for n, p in trained.items() if n.endswith("offset")]
    decayed = [p for n, p in trained.items() if not n.endswith("offset")]
    rate = config.learning_rate if config.offset_learning_rate is None else config.offset_learning_rate
    groups = [{"params": decayed}, {"params": free, "lr": rate, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)


def make_scheduler(config: RunConfig, optimizer: torch.optim.Optimizer):
    """The learning-rate schedule of a run."""
    return get_scheduler(
        {"constant": "constant_with_warmup"}.get(config.schedule, config.schedule),
        optimizer,
        num_warmup_steps=config.warmup_steps,
        num_training_steps=config.steps,
    )


def check_finite(terms: dict[str, float], step: int) -> None:
    """Raise ``FloatingPointError`` with all terms of the loss if one is not finite."""
    if not all(map(math.isfinite, terms.values())):
        listed = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
        raise FloatingPointError(
            f"the loss is not finite at step {step + 1}: {listed}. The last checkpoint is kept; lower "
            "learning_rate, set max_grad_norm, or use dtype float32"
        )


class _Run:
    def __init__(self, config: RunConfig, out: Path):
        self.config, self.out, self.run_folder = config, out, out / "run"
        self.base_folder = Path(config.base)
        base_config = load_base_config(self.base_folder)
        if not config.data:
            raise ValueError("no training data: give --data FILE [FILE ...] (or `self`)")
        stored_tensors(self.base_folder)
        # The gates' buffers change every step (running quantiles), and alike on all ranks.
        self.accelerator = Accelerator(
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
            gradient_accumulation_steps=1,
        )
        self.is_main = self.accelerator.is_main_process
        if self.accelerator.distributed_type == DistributedType.FSDP:
            raise ValueError(
                "FSDP by accelerate's settings would split the gates; launch plain processes and set shard_base to "
                "true, which splits the frozen base (FSDP2)"
            )
        self._divide_batch()
        self._claim_folder()
        hide_progress_bars()
        torch.manual_seed(config.seed)
        self.dtype = training_dtype(config.dtype, self.accelerator.device)
        base = AutoModelForCausalLM.from_pretrained(self.base_folder, config=base_config, dtype=self.dtype)
        self.base = base.eval().to(self.accelerator.device)
        if config.gradient_checkpointing:
            self._checkpoint_layers()
        self.tokenizer = AutoTokenizer.from_pretrained(self.base_folder)
        self._check_tokenizer(base_config)
        self.blocks = self._load_blocks()
        self.student = Student(self.base, config).to(self.accelerator.device)
        if config.shard_base and self.accelerator.num_processes > 1:
            self._shard_base()
        self.base_hash = fingerprint(self.base_folder)

    # --------------------------------------------------------------------------------------- set-up
    def _divide_batch(self) -> None:
        world, config = self.accelerator.num_processes, self.config
        if config.batch_size % world:
            raise ValueError(f"batch_size {config.batch_size} does not divide over {world} processes")
        local = config.batch_size // world
        micro = config.micro_batch_size or local
        if local % micro:
            raise ValueError(f"micro_batch_size {micro} does not divide the {local} sequences of each process")
        first = self.accelerator.process_index * local
        self.micro_batches = [range(first + i, first + i + micro) for i in range(0, local, micro)]

    def _claim_folder(self) -> None:
        """Resume the run that lives in ``out``, or start one; another run's folder is refused.

        A run that failed before its first step (a mistyped file name) left nothing worth keeping.
        """
        file = self.run_folder / RUN_CONFIG
        mine = {k: v for k, v in self.config.model_dump().items() if k not in MAY_CHANGE}
        has_started = any(f.is_file() for f in (self.run_folder / METRICS, self.out / ADAPTER_CONFIG))
        if has_started and file.is_file():
            theirs = {k: v for k, v in yaml.safe_load(file.read_text()).items() if k not in MAY_CHANGE}
            differing = sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))
            if differing:
                k = differing[0]
                raise ValueError(
                    f"{self.out} belongs to another run ({k}: {theirs.get(k)!r} there, {mine.get(k)!r} here); "
                    "choose another --out, or give the same settings to resume it"
                )
        elif not file.is_file() and self.out.exists() and any(self.out.iterdir()):
            raise ValueError(f"{self.out} exists and is not a training run; choose another --out")
        self.accelerator.wait_for_everyone()
        if self.is_main:
            self.run_folder.mkdir(parents=True, exist_ok=True)
            if not has_started:
                (self.run_folder / SELF_TEXT).unlink(missing_ok=True)
            file.write_text(yaml.safe_dump(self.config.model_dump(), sort_keys=False))
            if not (self.run_folder / "provenance.json").exists():
                write_json(self.run_folder / "provenance.json", provenance())
        self.accelerator.wait_for_everyone()

    def _checkpoint_layers(self) -> None:
        self.base.gradient_checkpointing_enable({"use_reentrant": False})
        self.base.train()  # transformers checkpoints layers in training mode only; no dropout all the same:
        for module in self.base.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            elif hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0

    def _shard_base(self) -> None:
        """Split every decoder layer over the processes (FSDP2); each is whole only while it computes.

        Embeddings, final norm and lm_head stay whole: the distillation loss reads lm_head's weight itself.
        """
        mesh = init_device_mesh(self.accelerator.device.type, (self.accelerator.num_processes,))
        for layer in self.base.model.layers:
            fully_shard(layer, mesh=mesh)

    def _check_tokenizer(self, base_config) -> None:
        if len(self.tokenizer) > base_config.vocab_size:
            raise ValueError(
                f"the tokenizer in {self.base_folder} has {len(self.tokenizer)} tokens, the model "
                f"{base_config.vocab_size}: they do not belong together"
            )

    def _load_blocks(self) -> InterleavedBlocks:
        config, sources = self.config, []
        for source in config.data:
            with self.accelerator.main_process_first():
                documents = self._self_text() if source == "self" else load_documents(source, config.text_column)
                sources.append(pack(documents, self.tokenizer, config.sequence_length))
        return InterleavedBlocks(sources, config.seed)

    def _self_text(self):
        """Text of the dense model itself, sampled once and kept, so that a resumed run sees the same."""
        file = self.run_folder / SELF_TEXT
        if not file.is_file():
            texts = sample_from_model(
                self.base,
                self.tokenizer,
                num_tokens=self.config.self_tokens,
                length=min(self.config.sequence_length, SELF_TEXT_LENGTH),
                seed=self.config.seed,
            )
            temporary = file.with_suffix(f".tmp-{os.getpid()}")
            temporary.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
            temporary.replace(file)
        return load_documents(str(file))

    def _start(self) -> None:
        """Routers and masks before the first step: from an adapter, from activations, or cold."""
        config, length = self.config, self.config.sequence_length
        if config.init_adapter:
            adapter = Adapter.load(Path(config.init_adapter))
            mismatch = [
                name
                for name in ("num_experts", "vo_mode", "value_router_dim")
                if getattr(adapter.config, name) != getattr(config, name)
            ]
            if mismatch:
                name = mismatch[0]
                raise ValueError(
                    f"{config.init_adapter} has {name} {getattr(adapter.config, name)!r}, this run "
                    f"{getattr(config, name)!r}; set {name} to match"
                )
            check_base(adapter, self.base_folder)
            self.student.load_layer_adapters(adapter.layers)
            return
        num_blocks = max(1, config.warm_start_tokens // length)
        batches = [self._on_device(torch.stack([self.blocks.block(i)])) for i in range(num_blocks)]
        if config.warm_start_tokens:
            warm_start(self.student, batches)
            release_memory()
        self.student.calibrate(torch.cat(batches[:4]))

    def _on_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.accelerator.device)

    # ----------------------------------------------------------------------------------------- loop
    def run(self) -> dict[str, Any]:
        config = self.config
        if (self.out / ADAPTER_CONFIG).is_file():
            summary = json.loads((self.out / ADAPTER_CONFIG).read_text())["training"]
            return {"adapter": str(self.out), "resumed_from": config.steps, **summary}
        optimizer = make_optimizer(config, self.student)
        scheduler = make_scheduler(config, optimizer)
        state = self._load_checkpoint()
        if state is None:
            self._start()
        first_step, seconds = 0, 0.0
        if state is not None:
            self.student.load_state_dict(state["student"])
            optimizer.load_state_dict(state["optimizer"])
            scheduler.load_state_dict(state["scheduler"])
            self.student.widths = Widths(**state["widths"]) if state["widths"] else None
            first_step, seconds = state["step"], state["seconds"]
        self._update_widths(first_step)
        model, optimizer = self.accelerator.prepare(self.student, optimizer)
        noise = NoiseSource.of(self.student, seed=config.seed)
        started = time.perf_counter() - seconds
        self._trim_metrics(first_step)
        with TrainProgress(config.steps, first_step, is_on=self.is_main) as progress, self._writer() as writer:
            for step in range(first_step, config.steps):
                if config.widths_every and step > first_step:
                    self._update_widths(step)
                terms = self._step(model, optimizer, noise, step)
                scheduler.step()
                done = step + 1
                elapsed = time.perf_counter() - started
                tokens_per_s = (done - first_step) * config.batch_size * config.sequence_length / (elapsed - seconds)
                progress.update(done, terms, tokens_per_s)
                if self.is_main and (done % config.log_every == 0 or done == config.steps):
                    rate = scheduler.get_last_lr()[0]
                    writer(done, terms | {"tokens_per_s": tokens_per_s, "learning_rate": rate})
                if done % config.checkpoint_every == 0 and done < config.steps:
                    self._save_checkpoint(done, elapsed, optimizer, scheduler)
        elapsed = time.perf_counter() - started
        return self._finish(terms, elapsed, first_step)

    def _update_widths(self, step: int) -> None:
        """Where the budget is exact: widths from the start, and again every ``widths_every`` steps if not 0."""
        config = self.config
        if config.budget != "exact":
            return
        if self.student.widths is None or (config.widths_every and step % config.widths_every == 0):
            self.student.update_widths()
        if not config.widths_every:
            self.student.freeze_widths()

    def _step(self, model, optimizer, noise: NoiseSource, step: int) -> dict[str, float]:
        config = self.config
        sums: dict[str, float] = {}
        for i, rows in enumerate(self.micro_batches):
            ids = self._on_device(self.blocks.batch(step, rows, config.batch_size))
            is_last = i == len(self.micro_batches) - 1
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model):
                out = model(ids, noise.draw(step, list(rows), config.sequence_length))
                self.accelerator.backward(out["loss"] / len(self.micro_batches))
            for name, value in out.items():
                sums[name] = sums.get(name, 0.0) + value.item() / len(self.micro_batches)
        self.student.update_quantiles()
        mean = self.accelerator.reduce(torch.tensor(list(sums.values()), dtype=torch.float64), "mean")
        terms = dict(zip(sums, mean.tolist(), strict=True))
        check_finite(terms, step)
        if config.max_grad_norm is not None:
            self.accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return terms

    # ---------------------------------------------------------------------------------------- files
    def _load_checkpoint(self) -> dict | None:
        file = self.run_folder / CHECKPOINT
        state = load_state(file, self.accelerator.device)
        if state is not None and state["base_hash"] != self.base_hash:
            raise ValueError(f"{file} was written for another base model than {self.base_folder}")
        return state

    def _save_checkpoint(self, step: int, seconds: float, optimizer, scheduler) -> None:
        self.accelerator.wait_for_everyone()
        if not self.is_main:
            return
        state = {
            "step": step,
            "seconds": seconds,
            "base_hash": self.base_hash,
            "student": self.student.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "widths": dataclasses.asdict(self.student.widths) if self.student.widths else None,
        }
        save_state(state, self.run_folder / CHECKPOINT)

    def _trim_metrics(self, first_step: int) -> None:
        """Drop what a killed run logged after its last checkpoint."""
        file = self.run_folder / METRICS
        if self.is_main and file.is_file():
            lines = [line for line in file.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line)["step"] <= first_step]
            file.write_text("".join(line + "\n" for line in kept))

    @contextlib.contextmanager
    def _writer(self):
        """Writes a step's terms to metrics.jsonl, and to TensorBoard where it is wanted and installed."""
        if not self.is_main:
            yield lambda step, terms: None
            return
        board: Any = None
        if self.config.tensorboard:
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                board = SummaryWriter(str(self.run_folder / "tensorboard"))
        with (self.run_folder / METRICS).open("a", buffering=1) as stream:

            def write(step: int, terms: dict[str, float]) -> None:
                stream.write(json.dumps({"step": step, **{k: round(v, 6) for k, v in terms.items()}}) + "\n")
                for name, value in terms.items() if board else ():
                    board.add_scalar(name, value, step)

            yield write
        if board:
            board.close()

    def _finish(self, terms: dict[str, float], seconds: float, first_step: int) -> dict[str, Any]:
        config = self.config
        widths = self.student.update_widths()
        tokens = config.steps * config.batch_size * config.sequence_length
        result = {
            "steps": config.steps,
            "tokens": tokens,
            "seconds": round(seconds, 1),
            "data": [Path(source).name for source in config.data],
            "active_ratio": widths.active_ratio(self.student.shape),
            "final": {name: round(value, 6) for name, value in terms.items()},
        }
        if self.is_main:
            run = {k: v for k, v in config.model_dump().items() if k not in ("base", "data", "notes")}
            adapter_config = AdapterConfig(
                base_model_name=self.base_folder.name,
                base_model_hash=self.base_hash,
                base_model_type=base_model_type(self.base.config),
                num_layers=self.base.config.num_hidden_layers,
                num_experts=config.num_experts,
                value_router_dim=config.value_router_dim,
                vo_mode=config.vo_mode,
                active_ratio=config.active_ratio,
                training=result | {"config": run, "provenance": provenance()},
            )
            adapter = Adapter(config=adapter_config, layers=self.student.layer_adapters())
            adapter.save(self.out, getattr(torch, config.adapter_dtype))
            (self.run_folder / CHECKPOINT).unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        return {"adapter": str(self.out), "resumed_from": first_step, **result}
