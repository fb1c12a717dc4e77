"""The decoder's norms with one calling convention, so that one decoder class serves RMSNorm and LayerNorm families.

``x``: [T, D]. ``norm(x)`` returns the normed tensor; ``norm(x, residual)`` returns
``(norm(x + residual), x + residual)``.
"""

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.layernorm import RMSNorm

from tomoe_vllm.compat import ops

KERNEL_MULTIPLE = 8
"""vLLM's CPU kernel needs widths that are multiples of this: vectors of 8 elements in every dtype."""


class ToMoERMSNorm(RMSNorm):
    """vLLM's RMSNorm that uses vLLM's compiled kernel on CPUs too; vLLM itself uses plain torch there.

    With a residual both tensors are overwritten, as on GPUs. In plain torch a norm allocates four tensors of the size
    of x and takes 1.2 to 20 times as long (benchmarks/norms.py, docs/performance.md). In the shared layout, which
    allocates nothing larger in between, these tensors also fragment glibc's heap, and the memory of a server grows
    (docs/notebook/log.md, 2026-11-26).
    """

    def forward_cpu(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        # The choice of kernel must not depend on the number of tokens: results are bit-identical in every batch.
        is_plain = self.variance_size_override is None and self.weight.dtype == x.dtype
        if not is_plain or self.hidden_size % KERNEL_MULTIPLE:
            return self.forward_native(x, residual)
        x = x.contiguous()  # heads that are views into a fused projection are not contiguous
        if residual is None:
            normed = torch.empty_like(x)
            ops.rms_norm(normed, x, self.weight.data, self.variance_epsilon)
            return normed
        residual = residual.contiguous()
        ops.fused_add_rms_norm(x, residual, self.weight.data, self.variance_epsilon)
        return x, residual


class ToMoELayerNorm(nn.LayerNorm):
    """torch's LayerNorm with the calling convention of this module."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if residual is None:
            return super().forward(x)
        residual = x + residual
        return super().forward(residual), residual
