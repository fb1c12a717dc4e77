"""Values across the processes (ranks) of a run. Without a process group every function returns its argument.

All tensors must be on the process's own device: plain NCCL has no backend for CPU tensors.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tomoe_training.budget import Widths


def num_ranks() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def end_process_group() -> None:
    """Destroy the process group, if there is one. NCCL warns of one that is left at exit."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def mean_over_ranks(value: Tensor) -> Tensor:
    """Mean over processes, without gradient. Does not wait for the device."""
    if num_ranks() == 1:
        return value.detach()
    mean = value.detach().clone()
    dist.all_reduce(mean)
    return mean / num_ranks()


def mean_with_local_gradient(value: Tensor) -> Tensor:
    """Mean over processes with the local gradient, which DDP averages to the gradient of the mean."""
    return value + (mean_over_ranks(value) - value.detach())


@torch.no_grad()
def broadcast_module(module: nn.Module) -> None:
    """Copy parameters and buffers of the first process to all others: they then agree bit for bit."""
    if num_ranks() > 1:
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), src=0)


def broadcast_widths(widths: Widths | None, num_layers: int, device: torch.device) -> Widths | None:
    """The widths of the first process, in every process. Those of the others are ignored."""
    if num_ranks() == 1:
        return widths
    values = [0.0] * (3 * num_layers + 2)
    if widths is not None:
        values = [1.0, widths.shift, *map(float, widths.experts + widths.qk_dims + widths.vo_dims)]
    message = torch.tensor(values, dtype=torch.float64, device=device)  # exact for every width and for the shift
    dist.broadcast(message, src=0)
    has_widths, shift, *dims = message.tolist()
    if not has_widths:
        return None
    experts, qk_dims, vo_dims = (
        [int(d) for d in dims[i * num_layers : (i + 1) * num_layers]] for i in range(3)
    )  # fmt: skip
    return Widths(experts=experts, qk_dims=qk_dims, vo_dims=vo_dims, shift=shift)
