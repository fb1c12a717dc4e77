"""MLP weights with one row per neuron. The checkpoint is copied into them while it is read: no second copy."""

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.utils import set_weight_attrs

from tomoe_vllm.kernels.expert_mlp.weight_layout import empty_panels, empty_rows

REORDERED_AT_A_TIME = 32
"""Number of column blocks that :meth:`NeuronRows.reorder` copies one by one, so that malloc can reuse its memory."""


class NeuronRows(nn.Module):
    """One projection of an MLP: this rank's neurons, as rows.

    ``weight``: [parts * F / tp, D]. A fused projection has two parts: the gate, then up. On a CPU the weight of a
    transposed projection (W_down) is [F / tp, panels, D / panels]. ``bias``: one value per row; for W_down one value
    per output, [D], on every rank. ``order``: row i is neuron ``order[i]`` of this rank's share of the checkpoint, [F /
    tp] int64; None: the order of the checkpoint. ``is_staged``: all neurons on every rank, in host memory and as plain
    matrices, for a layer that builds other tensors from them.

    Raises ``ValueError`` while loading for a tensor of another shape than the config says.
    """

    def __init__(
        self,
        hidden_size: int,
        num_neurons: int,
        *,
        num_parts: int = 1,
        has_bias: bool,
        is_transposed: bool = False,
        is_staged: bool = False,
    ) -> None:
        super().__init__()
        self.num_neurons, self.hidden_size = num_neurons, hidden_size
        self.num_local = num_neurons if is_staged else num_neurons // get_tensor_model_parallel_world_size()
        self.start = 0 if is_staged else get_tensor_model_parallel_rank() * self.num_local
        device = "cpu" if is_staged else None
        self.is_transposed = is_transposed
        num_rows = num_parts * self.num_local
        if is_staged:
            rows = torch.empty(num_rows, hidden_size, device=device)
        else:
            rows = (empty_panels if is_transposed else empty_rows)(num_rows, hidden_size)
        self.weight = nn.Parameter(rows, requires_grad=False)
        set_weight_attrs(self.weight, {"weight_loader": self._load_weight})
        self.order: Tensor | None = None
        self.bias: nn.Parameter | None = None
        if has_bias:
            size = hidden_size if is_transposed else num_rows
            self.bias = nn.Parameter(torch.empty(size, device=device), requires_grad=False)
            set_weight_attrs(self.bias, {"weight_loader": self._load_bias})

    def _load_weight(self, param: nn.Parameter, loaded: Tensor) -> None:
        self._copy_part(param, loaded.T if self.is_transposed else loaded, getattr(loaded, "shard_id", 0))

    def _load_bias(self, param: nn.Parameter, loaded: Tensor) -> None:
        if self.is_transposed:
            default_weight_loader(param, loaded)
        else:
            self._copy_part(param, loaded, getattr(loaded, "shard_id", 0))

    def _copy_part(self, param: nn.Parameter, rows: Tensor, part: int) -> None:
        """Copy this rank's neurons into part ``part`` (set by vLLM's weight mapper: 0 is the gate, 1 is up)."""
        expected = [self.num_neurons, self.hidden_size][: rows.ndim]  # a bias has no columns
        if list(rows.shape) != expected:
            raise ValueError(
                f"a tensor of the MLP has {list(rows.shape)} (neurons first); config.json says {expected}. "
                "Export the checkpoint again"
            )
        target = param.data.narrow(0, part * self.num_local, self.num_local)
        target.copy_(rows.narrow(0, self.start, self.num_local).reshape(target.shape))
        self.order = None

    def set_order(self, order: Tensor) -> None:
        """Permute this rank's neurons in place, a block of columns at a time. ``order``: [F / tp] int64."""
        present, self.order = self.order, order
        if present is not None:
            order = present.argsort()[order]
        per_row = [self.weight.data]
        if self.bias is not None and not self.is_transposed:
            per_row.append(self.bias.data[:, None])
        for rows in per_row:
            for part in rows.split(self.num_local):
                for columns in part.tensor_split(REORDERED_AT_A_TIME, dim=1):
                    columns.copy_(columns[order])
