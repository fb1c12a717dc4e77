"""The four losses (eq. 7 to 10) and the chunked distillation loss."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tomoe_vllm.hf.tomoe_math import BlockShape

KD_CHUNK_TOKENS = 128
"""Tokens whose logits exist at once: 2 x 128 x 49,152 floats are 50 MB. Larger chunks are not faster on CPUs."""


def f_reg(value: Tensor, target: float) -> Tensor:
    """``log(max(x, y) / min(x, y))`` = ``|log x - log y|``, the f_reg of eq. 7 and 8."""
    return (value.clamp(min=1e-6).log() - torch.tensor(target).log().to(value)).abs()


def parameter_loss(
    qk_dims: list[Tensor], vo_dims: list[Tensor], mlp_widths: list[Tensor], shape: BlockShape, active_ratio: float
) -> tuple[Tensor, Tensor]:
    """R_P (eq. 8) and the active ratio. Widths are scalar tensors per layer, with gradients."""
    active = torch.stack(
        [shape.active_parameters(*dims) for dims in zip(qk_dims, vo_dims, mlp_widths, strict=True)]
    ).sum()
    ratio = active / (shape.total_parameters * len(mlp_widths))
    return f_reg(ratio, active_ratio), ratio.detach()


def union_loss(masks: list[Tensor]) -> tuple[Tensor, Tensor]:
    """R_U (eq. 7, 16) over masks [N, F] per layer, and the mean union of the masks."""
    unions = torch.stack([(1 - torch.prod(1 - mask, dim=0)).mean() for mask in masks])
    return f_reg(unions, 1.0).mean(), unions.detach().mean()


def load_balance_loss(fractions: Tensor, probabilities: Tensor) -> Tensor:
    """R_L as ``sum_i F_i P_i``: mean over layers of [L, N] token fractions and mean router probabilities.

    1/N at perfect balance. Eq. 9 has an additional factor N, but the published gamma belongs to this scale: the
    paper's curve is near 0.15 (docs/method.md).
    """
    return (fractions * probabilities).sum(dim=-1).mean()


class _ChunkedKD(torch.autograd.Function):
    """KL(teacher || student) through the shared lm_head, in chunks of tokens.

    The gradient of the student's hidden states is computed in the forward pass, as in fused linear losses. Logits
    are computed once and freed with their chunk. Chunks of the vocabulary would need two passes for the softmax.
    """

    @staticmethod
    def forward(ctx, student: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor | None, chunk: int):
        total = torch.zeros((), dtype=torch.float64)
        gradient = torch.empty_like(student) if student.requires_grad else None
        for start in range(0, len(student), chunk):
            rows = slice(start, start + chunk)
            log_q = F.log_softmax(F.linear(student[rows], weight, bias).float(), dim=-1)
            log_p = F.log_softmax(F.linear(teacher[rows], weight, bias).float(), dim=-1)
            p = log_p.exp()
            # sum p (log p - log q), then dKL/dlogits = q - p, both in place: these tensors are the memory peak.
            total += torch.sum(log_p.sub_(log_q).mul_(p)).double().cpu()
            if gradient is not None:
                gradient[rows] = log_q.exp_().sub_(p).to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        ctx.num_tokens = len(student)
        return (total / len(student)).to(student.device, torch.float32)

    @staticmethod
    def backward(ctx, *grad_outputs):
        (gradient,) = ctx.saved_tensors
        return gradient * (grad_outputs[0] / ctx.num_tokens).to(gradient.dtype), None, None, None, None


def distillation_loss(student: Tensor, teacher: Tensor, lm_head, chunk: int = KD_CHUNK_TOKENS) -> Tensor:
    """Mean KL(teacher || student) per token, nats. Hidden states [T, D] after the final norm, any float dtype."""
    return _ChunkedKD.apply(student, teacher, lm_head.weight, lm_head.bias, chunk)


def language_model_loss(student: Tensor, labels: Tensor, lm_head, chunk: int = KD_CHUNK_TOKENS) -> Tensor:
    """Mean cross-entropy of the next tokens (the paper's ablation). [T, D] and [T] int64, already shifted."""
    total = student.new_zeros((), dtype=torch.float32)
    for start in range(0, len(student), chunk):
        rows = slice(start, start + chunk)

        def nll(hidden: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(lm_head(hidden).float(), target, reduction="sum")

        total = total + torch.utils.checkpoint.checkpoint(nll, student[rows], labels[rows], use_reentrant=False)
    return total / len(student)
