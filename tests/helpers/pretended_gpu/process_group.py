"""The backend ``pretended_nccl``: collectives for tensors on the pretended GPU and for no others, as plain NCCL.

The values travel through gloo on aliases of the tensors, and are there when a collective returns.
"""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves, tree_map_only

NAME = "pretended_nccl"
COLLECTIVES = (
    *("allreduce", "allreduce_coalesced", "broadcast", "reduce", "gather", "scatter"),
    *("allgather", "allgather_coalesced", "all_gather_single", "all_gather_single_coalesced"),
    *("reduce_scatter", "reduce_scatter_single", "reduce_scatter_single_coalesced"),
    *("alltoall", "all_to_all_single", "send", "recv"),
)


class PretendedNccl(dist.ProcessGroup):
    """A process group with one backend, for the pretended GPU."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta):
        super().__init__(rank, size)
        self._gloo = dist.ProcessGroup(store, rank, size)
        self._gloo._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
        backend = dist.ProcessGroupGloo(store, rank, size, timeout)
        self._gloo._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)

    @property
    def _device_types(self) -> list[torch.device]:
        return [torch.device("gpu")]

    @property
    def group_name(self) -> str:
        return dist.distributed_c10d._world.pg_names[self]

    def getBackendName(self) -> str:  # noqa: N802  (torch's name)
        return NAME

    def barrier(self, opts=None) -> dist.Work:
        """NCCL's barrier makes the host wait."""
        torch.accelerator.synchronize()
        self._gloo.barrier().wait()
        return _done(None)


def _collective(name: str):
    def run(self: PretendedNccl, *arguments) -> dist.Work:
        tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)]
        for tensor in tensors:
            if tensor.device.type != "gpu":
                raise RuntimeError(f"No backend type associated with device type {tensor.device.type}")
        with torch.no_grad():
            aliases = tree_map_only(torch.Tensor, torch.ops.pretended_gpu.on_cpu, arguments)
        getattr(self._gloo, name)(*aliases).wait()
        return _done(arguments[0])

    return run


def _done(value) -> dist.Work:
    future = torch.futures.Future()
    future.set_result(value)
    return torch._C._distributed_c10d._create_work_from_future(future)


for _name in COLLECTIVES:
    setattr(PretendedNccl, _name, _collective(_name))


def register() -> None:
    """Make ``init_process_group("pretended_nccl")`` known to torch."""
    dist.Backend.register_backend(NAME, PretendedNccl, devices=["gpu"])
