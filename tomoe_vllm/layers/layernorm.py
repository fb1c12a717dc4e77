"""LayerNorm with the calling convention of vLLM's RMSNorm, so that one decoder serves both kinds of family."""

from torch import Tensor, nn


class ToMoELayerNorm(nn.LayerNorm):
    """``norm(x)``, or with a residual ``(norm(x + residual), x + residual)``. ``x``: [T, D]."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        if residual is None:
            return super().forward(x)
        residual = x + residual
        return super().forward(residual), residual
