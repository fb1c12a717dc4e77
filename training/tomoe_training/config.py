"""A run's settings: one dataclass, read from YAML, ``--set key=value`` and flags. Unknown keys are errors."""

import dataclasses
import difflib
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tomoe_vllm.hf.configuration_tomoe import VO_MODES


@dataclass(kw_only=True, slots=True)
class MethodSettings:
    """What is trained, and the objective (eq. 10)."""

    active_ratio: float = 0.5
    """p: active block parameters over all block parameters."""
    num_experts: int = 8
    """N, experts per MLP."""
    value_router_dim: int = 128
    """d_e: size of the expert embeddings and of the value router's bottleneck."""
    vo_mode: str = "dynamic"
    """V/O dims: dynamic (per token), static (same for all tokens) or none (all kept)."""
    tau: float = 0.4
    """Temperature of the Gumbel relaxations."""
    local_embeddings: bool = False
    """Free embeddings instead of the hypernetwork (the paper's "local emb" ablation)."""
    train_offsets: bool = True
    """Also train the per-neuron offsets of the mask logits that a warm start sets."""
    objective: str = "kd"
    """kd: distillation from the dense model; lm: next-token loss (the paper's ablation)."""
    budget: str = "exact"
    """exact: masks always have the widths that export would give them; penalty: eq. 8 (the paper)."""
    alpha: float = 16.0
    """Weight of R_P; without effect when budget is exact."""
    beta: float = 2.0
    """Weight of R_U."""
    gamma: float = 1.0
    """Weight of R_L, as sum F_i P_i."""
    mask_noise: float = 0.0
    """Scale of the Gumbel noise on mask logits: 1 is the paper, 0 is none."""
    router_noise: float = 0.0
    """Scale of the Gumbel noise on router logits: 1 is the paper, 0 is none."""
    width_multiple: int = 32
    """Expert widths the exact budget rounds to."""
    head_dim_multiple: int = 8
    """Q/K (and static V/O) dims the exact budget rounds to."""


@dataclass(kw_only=True, slots=True)
class RunConfig(MethodSettings):
    """A whole training run."""

    base: str = ""
    """Folder of the dense model."""
    data: list[str] = field(default_factory=list)
    """Sources, interleaved 1:1: .txt/.jsonl/.json/.parquet files, wikitext, alpaca, code_alpaca, hf:NAME, self."""
    text_column: str | None = None
    """Column that holds the text, where it is not called `text`."""
    steps: int = 10_000
    sequence_length: int = 512
    batch_size: int = 2
    """Sequences per optimiser step, over all processes."""
    micro_batch_size: int | None = None
    """Sequences per forward pass and process; the rest is accumulated. Default: no accumulation."""
    learning_rate: float = 1e-3
    offset_learning_rate: float | None = None
    """Of the mask logits' offsets, where they are trained; default: learning_rate. Short runs need more."""
    weight_decay: float = 0.05
    schedule: str = "constant"
    """constant, linear or cosine (transformers' schedulers)."""
    warmup_steps: int = 0
    max_grad_norm: float | None = None
    seed: int = 0
    dtype: str = "auto"
    """Of the frozen base: float32, bfloat16, or auto (bfloat16 where the hardware multiplies it fast)."""
    gradient_checkpointing: bool = False
    shard_base: bool = False
    """Split the frozen base's layers over the processes (FSDP2) instead of one copy each; of no effect with one."""
    warm_start_tokens: int = 8192
    """Tokens of training text whose importances start routers, masks and widths; 0 is a cold start (the paper)."""
    init_adapter: str | None = None
    """Start from this adapter instead."""
    self_tokens: int = 100_000
    """Tokens to sample from the dense model for the data source `self`."""
    widths_every: int = 0
    """Exact budget: steps between two settlings of the widths. 0 keeps those of the start (docs/notebook says why)."""
    checkpoint_every: int = 200
    log_every: int = 10
    tensorboard: bool = True
    adapter_dtype: str = "float32"
    """What the adapter's tensors are stored in: float32 or bfloat16."""
    architecture: dict[str, Any] | None = None
    """The base's config, for --dry-run where its folder is not at hand (recipes carry it)."""
    notes: dict[str, Any] | None = None
    """Hardware, time and expected result: for the reader, without effect."""

    def validate(self) -> None:
        """Raise ``ValueError`` for what cannot be run."""
        if not 0 < self.active_ratio <= 1:
            raise ValueError(f"active_ratio is {self.active_ratio}; it must be in (0, 1]")
        choices = {
            "vo_mode": VO_MODES,
            "objective": ("kd", "lm"),
            "budget": ("exact", "penalty"),
            "schedule": ("constant", "linear", "cosine"),
            "dtype": ("auto", "float32", "bfloat16"),
            "adapter_dtype": ("float32", "bfloat16"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
        at_least_one = (
            "num_experts", "value_router_dim", "steps", "batch_size", "checkpoint_every", "log_every",
            "width_multiple", "head_dim_multiple",
        )  # fmt: skip
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.widths_every < 0:
            raise ValueError(f"widths_every is {self.widths_every}; it must be 0 (never) or more")
        if self.sequence_length < 2:
            raise ValueError(f"sequence_length is {self.sequence_length}; it must be at least 2")
        if self.tau <= 0:
            raise ValueError(f"tau is {self.tau}; it must be positive")
        if self.value_router_dim % 2:
            raise ValueError(f"value_router_dim is {self.value_router_dim}; it must be even (two GRU directions)")


def _fields() -> dict[str, dataclasses.Field]:
    return {f.name: f for f in dataclasses.fields(RunConfig)}


def _check_key(key: str) -> None:
    names = _fields()
    if key not in names:
        close = difflib.get_close_matches(key, names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(names)}"
        raise ValueError(f"unknown setting {key!r}{hint}")


def _check_type(key: str, value: Any) -> Any:
    kind = typing.get_type_hints(RunConfig)[key]
    kinds = tuple(typing.get_origin(k) or k for k in (typing.get_args(kind) or (kind,)))
    if typing.get_origin(kind) in (list, dict):
        kinds = (typing.get_origin(kind),)
    if float in kinds and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if (isinstance(value, bool) and bool not in kinds) or not isinstance(value, kinds):
        wanted = " or ".join("nothing" if k is type(None) else k.__name__ for k in kinds)
        raise ValueError(f"{key} is {value!r}; it must be {wanted}")
    return value


def load_run_config(file: Path | None, overrides: dict[str, Any], assignments: list[str]) -> RunConfig:
    """Resolve a run: defaults, then the YAML file, then flags (None is unset), then ``key=value`` strings.

    Raises ``ValueError`` for unknown keys (with the nearest name), wrong types and impossible values.
    """
    values: dict[str, Any] = {}
    if file is not None:
        if not file.is_file():
            raise FileNotFoundError(f"no such run config: {file}")
        try:
            values = yaml.safe_load(file.read_text()) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{file} must hold a mapping of settings")
    values |= {key: value for key, value in overrides.items() if value is not None}
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator:
            raise ValueError(f"--set takes key=value, got {assignment!r}")
        try:
            values[key.strip()] = _parse_scalar(text)
        except yaml.YAMLError as error:
            raise ValueError(f"--set {key.strip()}: {text!r} is not valid YAML") from error
    for key in values:
        _check_key(key)
    config = RunConfig(**{key: _check_type(key, value) for key, value in values.items()})
    config.validate()
    return config


def _parse_scalar(text: str) -> Any:
    value = yaml.safe_load(text)
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as a string
        try:
            return float(value)
        except ValueError:
            return value
    return value
