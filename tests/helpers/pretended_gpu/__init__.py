"""A device ``gpu`` for tests: its memory is the CPU's, its rules are CUDA's.

Within :func:`pretended_gpu` torch has two devices ``gpu:0`` and ``gpu:1``, and accelerate trains on them. Values are
computed by the CPU's kernels. What CUDA refuses is refused, with CUDA's messages:

* an operator with tensors of two devices, but for CPU tensors without dims that are only read, indices of ``x[...]``
  and copies (``index_select``, ``gather`` and ``embedding`` take no CPU indices),
* a generator of another device,
* a collective on a CPU tensor (process_group.py), as with plain NCCL.

What makes the host wait for a CUDA device is recorded by :func:`record_synchronizations`: ``item``, ``tolist``, bool
of a tensor, a copy to the CPU, a copy from memory that is not pinned or without ``non_blocking``, ``nonzero``,
indexing by a mask or by CPU indices, ``bincount``, ``unique``, ``repeat_interleave`` without ``output_size``,
``multinomial``, ``equal``, barriers, ``synchronize``. Fresh memory is filled with NaN.

``torch.gpu.memory_allocated()``, ``max_memory_allocated()`` and ``reset_peak_memory_stats()`` count the bytes of
storages as ``torch.cuda``'s functions do, without rounding to blocks and without the kernels' workspaces.

It is less than a GPU: kernels run at once and in order, so a race of two streams is not seen; kernels that only CUDA
has (FlashAttention, ``fused`` attention masks) are not run; float32 sums are the CPU's. ``x[mask] = y`` is taken as a
masked fill for every ``y`` without dims. On CUDA that is so for numbers only.

How: device.cpp registers a boxed fallback for PrivateUse1, torch's dispatch key for backends outside its tree. It is
compiled on first use (10 seconds) into the cache folder of the product's kernels. In a process that entered the mode
once the device stays registered, and is reported as not available outside the mode.
"""

import ctypes
import os
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch

from tests.helpers.pretended_gpu.library import DEVICE_NAME, load
from tests.helpers.processes import REPOSITORY

_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_char_p)


@contextmanager
def pretended_gpu() -> Iterator[torch.device]:
    """The mode: yields ``gpu:0``, or in a process of torchrun the device of its local rank."""
    from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState

    def reset() -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    def backend(*_) -> tuple[str | None, DistributedType]:
        is_alone = "LOCAL_RANK" not in os.environ
        return (None, DistributedType.NO) if is_alone else ("pretended_nccl", DistributedType.MULTI_GPU)

    library = load()
    device = torch.device(DEVICE_NAME, int(os.environ.get("LOCAL_RANK", 0)))
    reset()
    library.gpu_set_available(True)
    library.gpu_set_device(device.index)
    try:
        with (
            mock.patch.dict(os.environ, ACCELERATE_TORCH_DEVICE=str(device)),
            mock.patch.object(PartialState, "_prepare_backend", backend),
            mock.patch.object(torch.nn.Module, "_apply", _apply_in_place),
            # In this thread: stacks of a backward pass begin in the test, and the engine may have run before.
            torch.autograd.set_multithreading_enabled(False),
        ):
            yield device
    finally:
        library.gpu_set_available(False)
        reset()


_apply = torch.nn.Module._apply


def _apply_in_place(module: torch.nn.Module, *arguments, **options) -> torch.nn.Module:
    """``Module.to`` that keeps the identity of parameters, as on CUDA. For PrivateUse1 torch makes new ones."""
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return _apply(module, *arguments, **options)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


# ---------------------------------------------------------------------------------------------------- synchronisations
@dataclass(frozen=True)
class Synchronization:
    """One wait of the host for the device: the operator, and the stack from the outermost frame to the call."""

    what: str
    stack: traceback.StackSummary

    @property
    def place(self) -> str:
        """``file:line function`` of the innermost frame in this repository's packages, else of the innermost one."""
        inside = [f for f in self.stack if _is_product(f.filename)] or list(self.stack)
        frame = inside[-1]
        name = Path(frame.filename)
        shown = name.relative_to(REPOSITORY) if name.is_relative_to(REPOSITORY) else name.name
        return f"{shown}:{frame.lineno} {frame.name}"


@dataclass
class Synchronizations:
    """What :func:`record_synchronizations` recorded so far."""

    items: list[Synchronization] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.items)

    def __str__(self) -> str:
        counts = Counter((s.what, s.place) for s in self.items)
        return "\n".join(f"{n} x {what} at {place}" for (what, place), n in counts.most_common()) or "none"

    @property
    def operators(self) -> list[str]:
        """Names of the operators, in order."""
        return [s.what for s in self.items]


@contextmanager
def record_synchronizations() -> Iterator[Synchronizations]:
    """Record each wait of the host for the device in this block: its number is ``len``, ``str`` lists the places."""
    found = Synchronizations()

    def add(what: bytes) -> None:
        stack = traceback.StackSummary.extract(traceback.walk_stack(None), lookup_lines=False)
        stack.reverse()
        found.items.append(Synchronization(what.decode(), stack))

    callback = _CALLBACK(add)
    load().gpu_set_callback(callback)
    try:
        yield found
    finally:
        load().gpu_set_callback(_CALLBACK())


def _is_product(file: str) -> bool:
    return any(part in file for part in ("/tomoe_training/", "/tomoe_vllm/", "/tomoe_serving/"))
