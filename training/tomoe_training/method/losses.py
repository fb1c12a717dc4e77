"""The four losses (eq. 7 to 10) and the chunked distillation loss."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tomoe_vllm.hf.tomoe_math import BlockShape

CHUNK_BYTES = 2 << 30
"""Upper bound of the logits that exist at once, at :data:`BYTES_PER_LOGIT`."""
BYTES_PER_LOGIT = 16
"""Teacher and student, logits and log-probabilities, in float32."""
CPU_CHUNK, GPU_CHUNK = 128, 512
"""Fewest tokens of a chunk: operations of a bfloat16 GEMM per byte of lm_head's weight that it reads. 512 is above what
A100 (156) and H100 (295) need to be limited by arithmetic, and 128 above what CPUs need."""


def chunk_tokens(hidden_states: Tensor, lm_head) -> int:
    """Tokens whose logits exist at once.

    As in Liger's fused linear losses, logits get about as much memory as the hidden states, ``num_tokens / (V / D)``
    rounded up to a power of two, but no fewer tokens than keep the GEMM efficient and no more than
    :data:`CHUNK_BYTES`. LLaMA-2 7B with 2,048 tokens on a GPU: 2048 / (32000 / 4096) = 256, raised to 512 (262 MB).
    """
    num_tokens, is_on_cpu = len(hidden_states), hidden_states.device.type == "cpu"
    vocab_size, hidden_size = lm_head.weight.shape
    by_memory = -(-num_tokens // -(-vocab_size // hidden_size))
    chunk = max(1 << (by_memory - 1).bit_length(), CPU_CHUNK if is_on_cpu else GPU_CHUNK)
    return max(1, min(chunk, CHUNK_BYTES // (BYTES_PER_LOGIT * vocab_size), num_tokens))


def f_reg(value: Tensor, target: float) -> Tensor:
    """``log(max(x, y) / min(x, y))`` = ``|log x - log y|``, the f_reg of eq. 7 and 8."""
    return (value.clamp(min=1e-6).log() - torch.tensor(target, device="cpu").log().item()).abs()


def parameter_loss(
    qk_dims: list[Tensor], vo_dims: list[Tensor], mlp_widths: list[Tensor], shape: BlockShape, active_ratio: float
) -> tuple[Tensor, Tensor]:
    """R_P (eq. 8) and the active ratio. Widths are scalar tensors per layer, with gradients."""
    active = torch.stack(
        [shape.active_parameters(*dims) for dims in zip(qk_dims, vo_dims, mlp_widths, strict=True)]
    ).sum()
    ratio = active / (shape.total_parameters * len(mlp_widths))
    return f_reg(ratio, active_ratio), ratio.detach()


class _Union(torch.autograd.Function):
    """``1 - prod_i (1 - mask_i)`` of masks [N, F] of ones and zeros, with its gradient.

    A mask's gradient is 1 where no other mask is 1. (The backward pass of torch.prod counts zeros on the host.)
    """

    @staticmethod
    def forward(ctx, masks: Tensor) -> Tensor:
        counts = masks.sum(dim=0)
        ctx.save_for_backward(counts == masks)
        return counts.clamp(max=1)  # NaN stays NaN

    @staticmethod
    def backward(ctx, *grad_outputs):
        (is_alone,) = ctx.saved_tensors
        return grad_outputs[0] * is_alone


def union_loss(masks: list[Tensor]) -> tuple[Tensor, Tensor]:
    """R_U (eq. 7, 16) over masks [N, F] of ones and zeros per layer, and the mean union of the masks."""
    unions = torch.stack([_Union.apply(mask).mean() for mask in masks])
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
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        gradient = torch.empty_like(student) if student.requires_grad else None
        for start in range(0, len(student), chunk):
            rows = slice(start, start + chunk)
            log_q = F.log_softmax(F.linear(student[rows], weight, bias).float(), dim=-1)
            log_p = F.log_softmax(F.linear(teacher[rows], weight, bias).float(), dim=-1)
            p = log_p.exp()
            # sum p (log p - log q), then dKL/dlogits = q - p, both in place: these tensors are the memory peak.
            total += torch.sum(log_p.sub_(log_q).mul_(p)).double()
            if gradient is not None:
                gradient[rows] = log_q.exp_().sub_(p).to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        ctx.num_tokens = len(student)
        return (total / len(student)).float()

    @staticmethod
    def backward(ctx, *grad_outputs):
        (gradient,) = ctx.saved_tensors
        return gradient * (grad_outputs[0] / ctx.num_tokens).to(gradient.dtype), None, None, None, None


def distillation_loss(student: Tensor, teacher: Tensor, lm_head, chunk: int | None = None) -> Tensor:
    """Mean KL(teacher || student) per token, nats. Hidden states [T, D] after the final norm, any float dtype.

    ``chunk`` is the number of tokens at once, by default :func:`chunk_tokens`.
    """
    chunk = chunk or chunk_tokens(student, lm_head)
    return _ChunkedKD.apply(student, teacher, lm_head.weight, lm_head.bias, chunk)


def language_model_loss(student: Tensor, labels: Tensor, lm_head, chunk: int | None = None) -> Tensor:
    """Mean cross-entropy of the next tokens (the paper's ablation). [T, D] and [T] int64, already shifted."""
    chunk = chunk or chunk_tokens(student, lm_head)
    total = student.new_zeros((), dtype=torch.float32)
    for start in range(0, len(student), chunk):
        rows = slice(start, start + chunk)

        def nll(hidden: Tensor, target: Tensor) -> Tensor:
            return F.cross_entropy(lm_head(hidden).float(), target, reduction="sum")

        total = total + torch.utils.checkpoint.checkpoint(
            nll, student[rows], labels[rows], use_reentrant=False, preserve_rng_state=False
        )
    return total / len(student)
