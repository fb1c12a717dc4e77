"""Settings of training and fine-tuning runs."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field

from tomoe_vllm.settings import Model, Settings, read_assignments, read_file, resolve


class MethodSettings(Settings):
    """What is trained, and the objective (ToMoE, eq. 10)."""

    model_config = ConfigDict(strict=True)

    active_ratio: float = Field(default=0.5, gt=0, le=1)
    """Budget p: active block parameters divided by all block parameters."""
    num_experts: int = Field(default=8, ge=1)
    """Experts per MLP (N)."""
    value_router_dim: int = Field(default=128, ge=2, multiple_of=2)
    """Size of the expert embeddings and of the value router's bottleneck (d_e); even, for two GRU directions."""
    vo_mode: Literal["dynamic", "static", "none"] = "dynamic"
    """V/O dims: dynamic (chosen per token), static (the same for all tokens) or none (all kept)."""
    tau: float = Field(default=0.4, gt=0)
    """Temperature of the Gumbel relaxations."""
    local_embeddings: bool = False
    """Train free embeddings instead of the hypernetwork (the paper's ablation "local emb")."""
    train_offsets: bool = True
    """Also train the per-neuron offsets of the mask logits that a warm start sets."""
    objective: Literal["kd", "lm"] = "kd"
    """kd: distillation from the dense model; lm: next-token loss (the paper's ablation)."""
    budget: Literal["exact", "penalty"] = "exact"
    """exact: masks always have the widths that export would give them; penalty: eq. 8 (the paper)."""
    alpha: float = Field(default=16.0, ge=0)
    """Weight of R_P; without effect if budget is exact."""
    beta: float = Field(default=2.0, ge=0)
    """Weight of R_U."""
    gamma: float = Field(default=1.0, ge=0)
    """Weight of R_L, as sum F_i P_i."""
    mask_noise: float = Field(default=0.0, ge=0)
    """Scale of the Gumbel noise on mask logits: 1 as in the paper, 0 for none."""
    router_noise: float = Field(default=0.0, ge=0)
    """Scale of the Gumbel noise on router logits: 1 as in the paper, 0 for none."""
    width_multiple: int = Field(default=32, ge=1)
    """With the exact budget, expert widths are rounded to multiples of this."""
    head_dim_multiple: int = Field(default=8, ge=1)
    """With the exact budget, Q/K (and static V/O) dims are rounded to multiples of this."""


class RunConfig(MethodSettings):
    """A training run (``tomoe train``)."""

    base: str = ""
    """Folder of the dense model."""
    data: list[str] = []
    """Training text: .txt, .jsonl, .json or .parquet files, wikitext, alpaca, code_alpaca, hf:NAME, or self (sampled
    from the dense model). Several sources are interleaved 1:1."""
    text_column: str | None = None
    """Column that holds the text, if it is not called `text`."""
    steps: int = Field(default=10_000, ge=1)
    """Optimizer steps."""
    sequence_length: int = Field(default=512, ge=2)
    """Tokens per sequence."""
    batch_size: int = Field(default=2, ge=1)
    """Sequences per optimizer step, over all processes."""
    micro_batch_size: int | None = Field(default=None, ge=1)
    """Sequences per forward pass and process; gradients are accumulated. A step is then the same on any number of
    processes, because R_L and R_P are means over these micro-batches. Default: the batch in one pass."""
    learning_rate: float = Field(default=1e-3, ge=0)
    """Peak learning rate of AdamW."""
    offset_learning_rate: float | None = Field(default=None, ge=0)
    """Learning rate of the mask logits' offsets. Default: learning_rate; short runs need a larger one."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Weight decay of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate schedule (of transformers)."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises linearly from 0."""
    max_grad_norm: float | None = Field(default=None, gt=0)
    """Gradients are clipped to this norm. Default: no clipping."""
    seed: int = Field(default=0, ge=0)
    """Seed of batches, noise and initial weights."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the frozen base; auto is bfloat16 on hardware with fast bfloat16 GEMMs."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, to save memory."""
    shard_base: bool = False
    """Shard the frozen base's layers over the processes (FSDP2) instead of one copy in each."""
    process_timeout_minutes: int = Field(default=240, ge=1)
    """Minutes that a process waits for the others, such as for the first one to tokenize or to sample text."""
    warm_start_tokens: int = Field(default=8192, ge=0)
    """Tokens of training text whose importance scores initialize routers, masks and widths; 0 is a cold start (as in
    the paper)."""
    init_adapter: str | None = None
    """Start from this adapter instead of a warm start."""
    self_tokens: int = Field(default=100_000, ge=1)
    """Tokens to sample from the dense model for the data source `self`."""
    widths_every: int = Field(default=0, ge=0)
    """With the exact budget, steps between two updates of the widths; 0 keeps the initial widths (docs/notebook)."""
    checkpoint_every: int = Field(default=200, ge=1)
    """Steps between two training checkpoints."""
    log_every: int = Field(default=10, ge=1)
    """Steps between two lines of metrics."""
    tensorboard: bool = True
    """Also write the metrics for TensorBoard."""
    adapter_dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the adapter's tensors."""
    architecture: dict[str, Any] | None = None
    """The base's config, for --dry-run without its folder (recipes carry it)."""
    notes: dict[str, Any] | None = None
    """Hardware, time and expected result: for the reader, without effect."""


LEARNING_RATES = {"lora": 2e-4, "full": 2e-5}
"""Usual learning rates of the two methods of fine-tuning; not tuned here."""


class FinetuneConfig(Settings):
    """A fine-tuning run (``tomoe finetune``). AdamW without weight decay, cosine schedule, gradients clipped at 1."""

    model_config = ConfigDict(strict=True)

    data: list[str] = []
    """Training text, as for tomoe train (without `self`)."""
    text_column: str | None = None
    """Column that holds the text, if it is not called `text`."""
    method: Literal["lora", "full"] = "lora"
    """lora: low-rank updates of the blocks' linear layers, merged at the end; full: all dense weights."""
    rank: int = Field(default=16, ge=1)
    """Rank of LoRA's updates."""
    alpha: int = Field(default=32, ge=1)
    """LoRA's scale: the update is alpha / rank times the product."""
    learning_rate: float | None = Field(default=None, gt=0)
    """Peak learning rate. Default: 2e-4 for lora, 2e-5 for full."""
    steps: int = Field(default=500, ge=1)
    """Optimizer steps."""
    sequence_length: int = Field(default=512, ge=2)
    """Tokens per sequence."""
    batch_size: int = Field(default=2, ge=1)
    """Sequences per step."""
    seed: int = Field(default=0, ge=0)
    """Seed of batches and initial weights."""


def load_run_config(file: Path | None, flags: Mapping[str, Any], assignments: Iterable[str]) -> RunConfig:
    """Resolve a run: defaults, then the file, then flags (None is unset), then ``key=value`` assignments.

    Raises ``ValueError`` for unknown names (with the nearest known one), wrong types and impossible values.
    """
    return _load(RunConfig, file, flags, assignments)


def load_finetune_config(file: Path | None, flags: Mapping[str, Any], assignments: Iterable[str]) -> FinetuneConfig:
    """As :func:`load_run_config`, for a fine-tuning run."""
    return _load(FinetuneConfig, file, flags, assignments)


def _load(model: type[Model], file: Path | None, flags: Mapping[str, Any], assignments: Iterable[str]) -> Model:
    given = {name: value for name, value in flags.items() if value is not None}
    return resolve(model, read_file(model, file), given, read_assignments(assignments))
