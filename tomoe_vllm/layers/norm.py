"""The norms of the decoder, with one calling convention, so that one decoder serves both kinds of family.

``norm(x)``, or with a residual ``(norm(x + residual), x + residual)``. ``x``: [T, D].
"""

import torch
from torch import Tensor, nn
from vllm import _custom_ops as ops
from vllm.model_executor.layers.layernorm import RMSNorm

KERNEL_MULTIPLE = 8
"""Widths that vLLM's kernel takes on CPUs: whole vectors of 8 elements, in every dtype."""


class ToMoERMSNorm(RMSNorm):
    """vLLM's RMSNorm, on CPUs with vLLM's own compiled kernel, which it takes on GPUs only.

    With a residual both tensors are overwritten, as on GPUs. In plain torch a norm makes four tensors of x's size and
    takes 4 to 12 times as long (benchmarks/norms.py); and with nothing larger between them, as the shared layout has
    it, glibc does not fill the holes they leave, so that a server grows (docs/notebook, 2026-11-26).
    """

    def forward_cpu(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        # Nothing here may depend on the number of tokens: a token's bits are those of one way.
        is_plain = self.variance_size_override is None and self.weight.dtype == x.dtype
        if not is_plain or self.hidden_size % KERNEL_MULTIPLE:
            return self.forward_native(x, residual)
        x = x.contiguous()  # the heads of several tokens lie apart in a fused projection
        if residual is None:
            normed = torch.empty_like(x)
            ops.rms_norm(normed, x, self.weight.data, self.variance_epsilon)
            return normed
        residual = residual.contiguous()
        ops.fused_add_rms_norm(x, residual, self.weight.data, self.variance_epsilon)
        return x, residual


class ToMoELayerNorm(nn.LayerNorm):
    """torch's LayerNorm."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if residual is None:
            return super().forward(x)
        residual = x + residual
        return super().forward(residual), residual
