"""Weights of an MLP as one row per neuron, copied into place as the checkpoint is read: no second copy."""

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.utils import set_weight_attrs

from tomoe_vllm.kernels.expert_mlp.weight_layout import empty_panels, empty_rows

REORDERED_AT_A_TIME = 32
"""Shares of a part's columns, each copied: small enough that malloc has memory for it and need not map it anew."""


class NeuronRows(nn.Module):
    """This rank's neurons of a projection, as rows.

    ``weight``: [parts * F / tp, D]; part 0 is the gate, part 1 up, where both are one module. On a CPU that of a
    transposed projection (W_down) is [F / tp, panels, D / panels]. ``bias``: one value per row, or, of W_down, per
    output: [D], held by every rank. ``is_staged``: all neurons on every rank, in host memory, as plain matrices, for a
    layer that makes something else of them.
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
        self.bias: nn.Parameter | None = None
        if has_bias:
            size = hidden_size if is_transposed else num_rows
            self.bias = nn.Parameter(torch.empty(size, device=device), requires_grad=False)
            set_weight_attrs(self.bias, {"weight_loader": self._load_bias})

    def _load_weight(self, parameter: nn.Parameter, loaded: Tensor) -> None:
        self._place(parameter, loaded.T if self.is_transposed else loaded, getattr(loaded, "shard_id", 0))

    def _load_bias(self, parameter: nn.Parameter, loaded: Tensor) -> None:
        if self.is_transposed:
            default_weight_loader(parameter, loaded)
        else:
            self._place(parameter, loaded, getattr(loaded, "shard_id", 0))

    def _place(self, parameter: nn.Parameter, rows: Tensor, part: int) -> None:
        """Copy this rank's neurons into part ``part`` (vLLM's mapper sets it: 0 the gate, 1 up)."""
        expected = [self.num_neurons, self.hidden_size][: rows.ndim]  # a bias has no columns
        if list(rows.shape) != expected:
            raise ValueError(
                f"a tensor of the MLP has {list(rows.shape)} (neurons first); config.json says {expected}. "
                "Export the checkpoint again"
            )
        target = parameter.data.narrow(0, part * self.num_local, self.num_local)
        target.copy_(rows.narrow(0, self.start, self.num_local).reshape(target.shape))

    def reorder(self, order: Tensor) -> None:
        """Put this rank's neurons into another order, some columns at a time. ``order``: [F / tp] int64."""
        per_row = [self.weight.data]
        if self.bias is not None and not self.is_transposed:
            per_row.append(self.bias.data[:, None])
        for rows in per_row:
            for part in rows.split(self.num_local):
                for columns in part.tensor_split(REORDERED_AT_A_TIME, dim=1):
                    columns.copy_(columns[order])
