"""The training loop: self-distillation of a student, which is a frozen base model with trained gates.

A step is a function of (config, step): its batch, noise and learning rate. A checkpoint is therefore small
(trained modules, optimizer, step). A run that is killed at any point and started again with the same command
ends with the same weights: bit for bit on a CPU, up to the order of atomic additions on a GPU.
"""

import contextlib
import dataclasses
import json
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from torch import Tensor
from transformers import get_scheduler

from tomoe_training.artifacts.adapter import Adapter, AdapterConfig
from tomoe_training.artifacts.atomic import write_text
from tomoe_training.artifacts.export import check_base
from tomoe_training.artifacts.model_check import load_base_config, model_name, model_tensors
from tomoe_training.artifacts.provenance import provenance
from tomoe_training.artifacts.safetensors_io import fingerprint
from tomoe_training.artifacts.tokenizer_files import check_vocabulary, load_tokenizer
from tomoe_training.artifacts.training_state import check_state
from tomoe_training.base_model import load_base, use_causal_attention
from tomoe_training.budget import Widths
from tomoe_training.config import RunConfig
from tomoe_training.data import InterleavedBlocks, micro_batches, pack, sample_from_model
from tomoe_training.documents import check_source, load_documents
from tomoe_training.dtypes import to_device, training_dtype
from tomoe_training.method.relaxation import NoiseSource
from tomoe_training.method.student import Student
from tomoe_training.process_setup import hide_progress_bars, is_first_process, release_memory
from tomoe_training.progress import TrainProgress
from tomoe_training.run_folder import RunFolder
from tomoe_training.terms import TermHistory
from tomoe_training.warm_start.initialization import assist_warm_start, warm_start
from tomoe_vllm.hf.configuration_tomoe import base_model_type

SELF_TEXT_LENGTH = 256
"""Tokens of one text sampled from the dense model. Decoding is serial: a batch of short texts is faster."""


def train(config: RunConfig, out: Path) -> dict[str, Any]:
    """Train (or resume) a run and write its adapter to ``out``. Returns a JSON-ready summary.

    Runs unchanged under ``torchrun`` and ``accelerate launch``; ``batch_size`` is over all processes.
    Raises ``ValueError`` for bad input and ``FloatingPointError`` for a loss that is not finite.
    """
    return _Run(config, out).run()


def make_optimizer(config: RunConfig, student: Student) -> torch.optim.AdamW:
    """AdamW over the trained parameters, with a separate group for the offsets."""
    trained = {n: p for n, p in student.named_parameters() if p.requires_grad}
    # Weight decay would pull the warm start's logits to the threshold. All else decays, as in the paper.
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


class _Run:
    def __init__(self, config: RunConfig, out: Path):
        self.config, self.out, self.files = config, out, RunFolder(out)
        self.base_folder = Path(config.base)
        base_config = load_base_config(self.base_folder)
        if not config.data:
            raise ValueError("no training data: give --data FILE [FILE ...] (or `self`)")
        model_tensors(self.base_folder, base_config, warns=is_first_process())
        self.tokenizer = load_tokenizer(self.base_folder, warns=is_first_process())
        check_vocabulary(self.tokenizer, base_config.vocab_size, self.base_folder)
        for source in config.data:
            check_source(source, config.text_column, self.tokenizer)
        # The gates' buffers (running quantiles) change every step, equally on all ranks.
        self.accelerator = Accelerator(
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False),
                # Others wait while the first process tokenizes, samples text or computes the warm start.
                InitProcessGroupKwargs(timeout=timedelta(minutes=config.process_timeout_minutes)),
            ],
            gradient_accumulation_steps=1,
        )
        self.is_main = self.accelerator.is_main_process
        if self.accelerator.distributed_type == DistributedType.FSDP:
            raise ValueError(
                "FSDP in accelerate's settings would shard the gates; launch plain processes and set shard_base to "
                "true, which shards the frozen base (FSDP2)"
            )
        self.micro_batches = micro_batches(
            config.batch_size, config.micro_batch_size, self.accelerator.process_index, self.accelerator.num_processes
        )
        self._open_run_folder()
        hide_progress_bars()
        torch.manual_seed(config.seed)
        self.dtype = training_dtype(config.dtype, self.accelerator.device)
        self.is_sharded = config.shard_base and self.accelerator.num_processes > 1
        self.base = load_base(
            self.base_folder, base_config, self.dtype, self.accelerator.device, is_sharded=self.is_sharded
        )
        self.blocks = self._load_blocks()
        if config.gradient_checkpointing:
            self._checkpoint_layers()  # after sampling: layers that are checkpointed ignore the KV cache
        use_causal_attention(self.base, config.sequence_length)
        self.student = Student(self.base, config).to(self.accelerator.device)
        # Micro-batches of a fixed size are the same on every number of processes, and so are their losses.
        self.student.spans_ranks = config.micro_batch_size is None
        self.base_hash = fingerprint(self.base_folder)
        self.terms = TermHistory()

    # -------------------------------------------------------------------------------------------------------- set-up
    def _open_run_folder(self) -> None:
        self.files.check(self.config)
        self.accelerator.wait_for_everyone()
        if self.is_main:
            self.files.create(self.config)
        self.accelerator.wait_for_everyone()

    def _checkpoint_layers(self) -> None:
        self.base.gradient_checkpointing_enable({"use_reentrant": False})
        self.base.train()  # transformers checkpoints layers only in training mode; dropout stays off:
        for module in self.base.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            elif hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.0

    def _load_blocks(self) -> InterleavedBlocks:
        config, sources = self.config, []
        for source in config.data:
            if source == "self" and self.is_sharded:
                self._sample_text()  # every process has a part of the model
            with self.accelerator.main_process_first():
                if source == "self":
                    self._sample_text()
                if source == "self":
                    documents = load_documents(str(self.files.self_text))
                else:
                    documents = load_documents(source, config.text_column, self.tokenizer)
                sources.append(pack(documents, self.tokenizer, config.sequence_length, source))
        return InterleavedBlocks(sources, config.seed)

    def _sample_text(self) -> None:
        """Store text sampled from the dense model, unless there is some: a resumed run reads the same text."""
        if self.files.self_text.is_file():
            return
        texts = sample_from_model(
            self.base,
            self.tokenizer,
            num_tokens=self.config.self_tokens,
            length=min(self.config.sequence_length, SELF_TEXT_LENGTH),
            seed=self.config.seed,
            is_sharded=self.is_sharded,
        )
        if self.is_main:
            write_text(self.files.self_text, "".join(json.dumps({"text": text}) + "\n" for text in texts))

    def _initialize_student(self) -> None:
        """Set routers and masks before the first step: from an adapter, by a warm start, or leave them random.

        The first process computes them, and the others get its bits.
        """
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
            self.student.broadcast()
            return
        num_blocks = max(1, config.warm_start_tokens // length)
        batches = [self._on_device(torch.stack([self.blocks.block(i)])) for i in range(num_blocks)]
        if config.warm_start_tokens:
            if self.is_main:
                warm_start(self.student, batches)
            elif self.is_sharded:
                assist_warm_start(self.student, batches)
            release_memory()
        self.student.broadcast()
        self.student.calibrate(torch.cat(batches[:4]))

    def _on_device(self, tensor: Tensor) -> Tensor:
        return to_device(tensor, self.accelerator.device)

    # ---------------------------------------------------------------------------------------------------------- loop
    def run(self) -> dict[str, Any]:
        config = self.config
        summary = self.files.summary()
        if summary is not None:
            return {"adapter": str(self.out), "resumed_from": config.steps, **summary}
        optimizer = make_optimizer(config, self.student)
        scheduler = make_scheduler(config, optimizer)
        state = self.files.load_checkpoint(self.base_hash, self.accelerator.device, self._noise_device())
        if state is None:
            self._initialize_student()
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
        with (
            TrainProgress(config.steps, first_step, is_on=self.is_main) as progress,
            self._metrics(first_step) as write,
        ):
            for step in range(first_step, config.steps):
                if config.widths_every and step > first_step:
                    self._update_widths(step)
                self._step(model, optimizer, noise, step)
                scheduler.step()
                done = step + 1
                progress.advance(done)
                if done % config.log_every == 0 or done == config.steps:
                    terms = self.terms.read()
                    elapsed = time.perf_counter() - started
                    num_tokens = (done - first_step) * config.batch_size * config.sequence_length
                    tokens_per_s = num_tokens / (elapsed - seconds)
                    progress.update(done, terms, tokens_per_s)
                    rate = scheduler.get_last_lr()[0]
                    write(done, terms | {"tokens_per_s": tokens_per_s, "learning_rate": rate})
                if done % config.checkpoint_every == 0 and done < config.steps:
                    self._save_checkpoint(done, time.perf_counter() - started, optimizer, scheduler)
        return self._finish(terms, time.perf_counter() - started, first_step)

    def _noise_device(self) -> str | None:
        """What draws this run's noise: "cpu" or the GPU's model; None if there is no noise.

        ``torch.rand`` depends on the number of multiprocessors, so that GPU models draw different numbers.
        """
        if not (self.config.mask_noise or self.config.router_noise):
            return None
        device = self.accelerator.device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

    def _update_widths(self, step: int) -> None:
        """With the exact budget: set the widths at the start, and every ``widths_every`` steps if that is not 0."""
        config = self.config
        if config.budget != "exact":
            return
        if self.student.widths is None or (config.widths_every and step % config.widths_every == 0):
            self.terms.read()  # no widths from logits that are not finite
            self.student.update_widths()
        if not config.widths_every:
            self.student.freeze_widths()

    def _step(self, model, optimizer, noise: NoiseSource, step: int) -> None:
        """One optimizer step. The host does not wait for the device: ``self.terms`` keeps the loss there."""
        config, num_passes = self.config, len(self.micro_batches)
        sums = torch.zeros((), dtype=torch.float64, device=self.accelerator.device)
        for i, rows in enumerate(self.micro_batches):
            ids = self._on_device(self.blocks.batch(step, rows, config.batch_size))
            is_last = i == num_passes - 1
            with contextlib.nullcontext() if is_last else self.accelerator.no_sync(model):
                out = model(ids, noise.draw(step, list(rows), config.sequence_length))
                self.accelerator.backward(out["loss"] / num_passes)
            sums = sums + torch.stack(list(out.values())).detach().double() / num_passes
        self.terms.add(step, out, sums)
        self.student.update_quantiles()
        if config.max_grad_norm is not None:
            self.accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    # --------------------------------------------------------------------------------------------------------- files
    def _save_checkpoint(self, step: int, seconds: float, optimizer, scheduler) -> None:
        """Save a training state, unless a value in it is not finite: then every process raises."""
        self.terms.read()
        state = {
            "step": step,
            "seconds": seconds,
            "base_hash": self.base_hash,
            "noise_device": self._noise_device(),
            "student": self.student.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scheduler": scheduler.state_dict(),
            "widths": dataclasses.asdict(self.student.widths) if self.student.widths else None,
        }
        check_state(state, step)
        if self.is_main:
            self.files.save_checkpoint(state)

    @contextlib.contextmanager
    def _metrics(self, first_step: int):
        """Function that logs a step's terms. Processes other than the main one log nothing."""
        if not self.is_main:
            yield lambda step, terms: None
            return
        self.files.trim_metrics(first_step)
        with self.files.metrics_writer(self.config.tensorboard) as write:
            yield write

    def _finish(self, terms: dict[str, float], seconds: float, first_step: int) -> dict[str, Any]:
        config = self.config
        check_state(self.student.state_dict(), config.steps)
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
                base_model_name=model_name(self.base_folder),
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
            self.files.checkpoint.unlink(missing_ok=True)
        self.accelerator.wait_for_everyone()
        return {"adapter": str(self.out), "resumed_from": first_step, **result}
