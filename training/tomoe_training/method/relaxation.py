"""Gumbel relaxations with straight-through gradients (appendix A.3), and their noise.

The noise of a step is a pure function of (seed, step, sequence) on one kind of device. Training checkpoints need no
random state, and two processes with one sequence each draw the same noise as one process with both.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tomoe_training.seeds import Stream, generator_on
from tomoe_vllm.hf.tomoe_math import GUMBEL_MEDIAN, KEEP_BIAS


class _StraightThrough(torch.autograd.Function):
    """``hard + (soft - soft.detach())`` without its graph."""

    @staticmethod
    def forward(ctx, hard: Tensor, soft: Tensor) -> Tensor:
        return torch.sub(soft, soft).add_(hard)  # zero unless not finite: NaN must reach the loss

    @staticmethod
    def backward(ctx, *grad_outputs):
        return None, grad_outputs[0]


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """Value of ``hard`` (any dtype, no gradient), gradient of ``soft``; in the dtype of ``soft``. NaN stays NaN."""
    return _StraightThrough.apply(hard, soft)


def gumbel(shape: tuple[int, ...], random: np.random.Generator | torch.Generator) -> Tensor:
    """Gumbel(0, 1) noise, float32, on the generator's device (NumPy's: on the CPU)."""
    if isinstance(random, torch.Generator):
        uniform = torch.rand(shape, generator=random, device=random.device)
    else:
        uniform = torch.from_numpy(random.random(shape, dtype=np.float32))
    return -torch.log(-torch.log(uniform.clamp_(1e-20, 1 - 1e-7)))


def sample_mask(logits: Tensor, noise: Tensor | None, tau: float) -> Tensor:
    """ST-GSig, eq. 15: ``round(sigmoid((logits + g + b) / tau))``, a mask of ones and zeros.

    Without noise g is its median, and the mask is where :func:`keep_margin` is positive. Any shape.
    """
    soft = torch.sigmoid((logits + (GUMBEL_MEDIAN if noise is None else noise) + KEEP_BIAS) / tau)
    return straight_through(soft > 0.5, soft)


def width_mask(logits: Tensor, width: int, noise: Tensor | None, tau: float) -> Tensor:
    """Mask with exactly ``width`` ones in the last dimension, as export keeps them, with a gradient.

    The gradient is that of ``sigmoid((logits - threshold) / tau)`` with a constant threshold, halfway between the
    last kept and the first dropped logit.
    """
    noisy = logits if noise is None else logits + noise
    size = logits.shape[-1]
    if width >= size:  # all ones: the gradient is zero, but DDP needs it to exist
        return straight_through(torch.ones_like(noisy), 0 * noisy)
    # Search the smaller side plus one entry, sorted: the last two are next to the threshold.
    keeps_most = 2 * width > size
    few = noisy.detach().topk(1 + (size - width if keeps_most else width), dim=-1, largest=not keeps_most)
    hard = torch.full_like(noisy.detach(), float(keeps_most))
    hard.scatter_(-1, few.indices[..., :-1], float(not keeps_most))
    threshold = few.values[..., -2:].mean(dim=-1, keepdim=True)
    return straight_through(hard, torch.sigmoid((noisy - threshold) / tau))


def sample_route(logits: Tensor, noise: Tensor | None, tau: float) -> tuple[Tensor, Tensor]:
    """ST-GSmax, eq. 14: the expert of each token, [T] int64, and the softmax with temperature ``tau``, [T, N].

    The route is the one-hot vector of the expert with the gradient of the softmax.
    """
    noisy = logits if noise is None else logits + noise
    return noisy.argmax(dim=-1), torch.softmax(noisy / tau, dim=-1)


@dataclass(frozen=True, kw_only=True)
class StepNoise:
    """Gumbel noise of one step; None means no noise.

    experts: [L, N, F], query_key: [L, U] (one draw per step, shared by all tokens and processes);
    router: [L, B, S, N], value: [L, B, S, A] (one draw per token).
    """

    experts: Tensor | None
    query_key: Tensor | None
    router: Tensor | None
    value: Tensor | None


@dataclass(frozen=True, kw_only=True)
class NoiseSource:
    """Draws the noise of a step, scaled by ``mask_scale`` and ``router_scale``: 1 as in the paper, 0 for none."""

    device: torch.device
    seed: int
    num_layers: int
    num_experts: int
    num_neurons: int
    num_units: int
    head_dim: int
    mask_scale: float
    router_scale: float

    @classmethod
    def of(cls, student, seed: int) -> "NoiseSource":
        """Noise with the shapes and scales of a student."""
        shape, settings = student.shape, student.settings
        return cls(
            device=student.value_quantiles.device,
            seed=seed,
            num_layers=len(student.expert_gates),
            num_experts=settings.num_experts,
            num_neurons=shape.intermediate_size,
            num_units=shape.num_units,
            head_dim=shape.head_dim,
            mask_scale=settings.mask_noise,
            router_scale=settings.router_noise,
        )

    def draw(self, step: int, sequence_ids: list[int], length: int) -> StepNoise:
        """Noise of ``step`` for sequences, given by their global indices, of ``length`` tokens."""
        layers, masks, routes = self.num_layers, self.mask_scale, self.router_scale
        shared = generator_on(self.device, self.seed, Stream.SHARED_NOISE, step)
        per_token = [
            generator_on(self.device, self.seed, Stream.SEQUENCE_NOISE, step, sequence) for sequence in sequence_ids
        ]

        def tokens(width: int, scale: float) -> Tensor | None:
            if not scale:
                return None
            return scale * torch.stack([gumbel((layers, length, width), g) for g in per_token], dim=1)

        return StepNoise(
            experts=masks * gumbel((layers, self.num_experts, self.num_neurons), shared) if masks else None,
            query_key=masks * gumbel((layers, self.num_units), shared) if masks else None,
            router=tokens(self.num_experts, routes),
            value=tokens(self.head_dim, masks),
        )
