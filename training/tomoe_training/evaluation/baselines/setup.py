"""What every method of a comparison is given, and what it gives back: gates on one frozen model.

All methods end as gates (subclasses of the reference model's), so that one forward pass and one
evaluation serve all of them, and their budgets are counted by one formula (eq. 8).
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
"""Tokens of training text for activation statistics where the run has no warm start to go by."""


@dataclass(frozen=True, kw_only=True)
class Contest:
    """One model, one text, one budget. ``base`` is frozen, in float32, and carries every method's gates."""

    base: Any
    config: RunConfig
    blocks: InterleavedBlocks
    work: Path
    """Folder for what is trained here."""
    adapter: Path | None = None
    """ToMoE's adapter, where it is already trained."""
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
        """What a trained method may see, T x D of the run: steps x sequences x tokens."""
        return self.config.steps * self.config.batch_size * self.config.sequence_length

    def calibration(self) -> Iterator[Tensor]:
        """The first blocks of training text, as many as ToMoE's warm start sees: [1, sequence_length] each."""
        tokens = self.config.warm_start_tokens or CALIBRATION_TOKENS
        for i in range(max(1, tokens // self.config.sequence_length)):
            yield self.blocks.block(i).unsqueeze(0).to(self.base.device)

    @torch.no_grad()
    def observe(self, paths: list[str], see: Callable[[int, str, Tensor], None]) -> int:
        """Run the calibration text through the dense model; returns its tokens.

        ``see(layer, path, inputs)`` gets the input [T, size], float32, of the module ``path`` of each layer.
        """
        handles = []
        for i, layer in enumerate(self.layers):
            for path in paths:

                def hook(module, args, i=i, path=path):
                    see(i, path, args[0].detach().flatten(0, -2).float())

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
    """What a method makes of the dense model."""

    heads: list[HeadGate]
    """One per layer, or none at all: attention stays dense."""
    experts: list[ExpertGate]
    widths: Widths
    """What one token uses of every layer, at most."""
    tokens: int
    """Tokens of text that made the gates, for calibration or training."""
    seconds: float | None = None
    """Time it took, where that was in another run."""
    note: str = ""

    def attach(self, base) -> None:
        """Put the gates on a model, switched off."""
        family = family_of(base.config)
        self.set_on(False)
        for layer, head in zip(base.model.layers, self.heads, strict=True) if self.heads else ():
            head.to(base.device).attach(layer, family)
        for layer, expert in zip(base.model.layers, self.experts, strict=True):
            expert.to(base.device).attach(layer, family)

    def set_on(self, is_on: bool) -> None:
        """True for this method's model, False for the dense one."""
        for head in self.heads:
            head.is_on = is_on
        for expert in self.experts:
            expert.is_on = is_on
