"""Input and output of the methods in a comparison: a model with text and budget, and gates on that model.

All methods produce gates (subclasses of the reference model's). One evaluation serves all of them, and their
budgets are counted by one formula (eq. 8).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tomoe_training.budget import Widths
from tomoe_training.config import RunConfig
from tomoe_training.data import InterleavedBlocks
from tomoe_vllm.hf.configuration_tomoe import Family, block_shape, family_of
from tomoe_vllm.hf.modeling_tomoe import ExpertGate, HeadGate
from tomoe_vllm.hf.tomoe_math import BlockShape

CALIBRATION_TOKENS = 8192
"""Tokens of training text for activation statistics in a run without a warm start."""


@dataclass(frozen=True, kw_only=True)
class BaselineSetup:
    """Model, text and budget of a comparison. ``base`` is frozen and in float32; all methods attach gates to it."""

    base: Any
    config: RunConfig
    blocks: InterleavedBlocks
    work: Path
    """Folder of the adapters and routers that are trained."""
    adapter: Path | None = None
    """ToMoE's adapter, if it is already trained."""
    report: Callable[[str], None] = field(default=lambda text: None)
    """Shows one line of progress to a person."""

    @property
    def shape(self) -> BlockShape:
        return block_shape(self.base.config)

    @property
    def family(self) -> Family:
        return family_of(self.base.config)

    @property
    def layers(self) -> list[nn.Module]:
        return list(self.base.model.layers)

    @property
    def training_tokens(self) -> int:
        """Training tokens of a method: steps x sequences x tokens per sequence."""
        return self.config.steps * self.config.batch_size * self.config.sequence_length

    def calibration(self) -> Iterator[Tensor]:
        """The first blocks of training text, as many as ToMoE's warm start reads: [1, sequence_length] each."""
        tokens = self.config.warm_start_tokens or CALIBRATION_TOKENS
        for i in range(max(1, tokens // self.config.sequence_length)):
            yield self.blocks.block(i).unsqueeze(0).to(self.base.device)

    @torch.no_grad()
    def observe(self, paths: list[str], record: Callable[[int, str, Tensor], None]) -> int:
        """Run the calibration text through the dense model; returns the number of tokens.

        ``record(layer, path, inputs)`` is called with the input [T, size] float32 of module ``path`` of each layer.
        """
        handles = []
        for i, layer in enumerate(self.layers):
            for path in paths:

                def hook(module, args, i=i, path=path):
                    record(i, path, args[0].detach().flatten(0, -2).float())

                handles.append(layer.get_submodule(path).register_forward_pre_hook(hook))
        try:
            num_tokens = 0
            for batch in self.calibration():
                self.base.model(input_ids=batch, use_cache=False)
                num_tokens += batch.numel()
        finally:
            for handle in handles:
                handle.remove()
        return num_tokens


@dataclass(kw_only=True)
class MethodGates:
    """The gates of one method."""

    heads: list[HeadGate]
    """One per layer, or empty: attention stays dense."""
    experts: list[ExpertGate]
    widths: Widths
    """Upper bounds of what one token uses in each layer."""
    tokens: int
    """Tokens used for calibration or training."""
    seconds: float | None = None
    """Training time, if the training was another run; else None."""
    note: str = ""

    def attach(self, base) -> None:
        """Attach the gates to a model, switched off."""
        family = family_of(base.config)
        self.set_on(False)
        for layer, head in zip(base.model.layers, self.heads, strict=True) if self.heads else ():
            head.to(base.device).attach(layer, family)
        for layer, expert in zip(base.model.layers, self.experts, strict=True):
            expert.to(base.device).attach(layer, family)

    def set_on(self, is_on: bool) -> None:
        """Switch between this method (True) and the dense model (False)."""
        for head in self.heads:
            head.is_on = is_on
        for expert in self.experts:
            expert.is_on = is_on
