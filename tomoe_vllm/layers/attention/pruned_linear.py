"""Linears of which some rows or columns are never used.

vLLM's own linear loads and shards the checkpoint's tensor; once it is loaded the kept part takes its place, layer by
layer and before vLLM packs it for oneDNN on CPUs. So nothing of what was cut off is kept or computed, and at most one
layer's weight exists twice.
"""

from collections.abc import Callable

from torch import Tensor, nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod


class PrunedLinearMethod(UnquantizedLinearMethod):
    """What vLLM calls to finish and to run a linear; ``kept()`` gives the rows (or columns) of this rank that stay."""

    supports_pre_processed_weights = False

    def __init__(self, kept: Callable[[], Tensor], *, is_column: bool = False) -> None:
        super().__init__()
        self.kept, self.dim = kept, int(is_column)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Cut, then do what vLLM does with any unquantized weight."""
        kept = self.kept()
        layer.weight = nn.Parameter(layer.weight.data.index_select(self.dim, kept), requires_grad=False)
        if self.dim == 0 and layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias.data[kept], requires_grad=False)
        super().process_weights_after_loading(layer)
