"""``torch.gpu``: what torch, FSDP2 and accelerate ask of ``torch.cuda``, for the pretended device.

There is one stream: all work is done when an operator returns.
"""

import ctypes
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.cpu import Event as _CpuEvent
from torch.cpu import Stream as _CpuStream

from tests.helpers.pretended_gpu.library import load

NUM_DEVICES = 2


def is_available() -> bool:
    return bool(load().gpu_is_available())


def is_initialized() -> bool:
    return True


def _lazy_init() -> None: ...


def _is_in_bad_fork() -> bool:
    return False


def device_count() -> int:
    return NUM_DEVICES


def current_device() -> int:
    return load().gpu_current_device()


def set_device(device: "torch.device | str | int") -> None:
    load().gpu_set_device(_index(device))


def _index(device: "torch.device | str | int | None") -> int:
    if isinstance(device, int):
        return device
    index = None if device is None else torch.device(device).index
    return current_device() if index is None else index


class device(AbstractContextManager):  # noqa: N801  (torch.cuda's name)
    """``with torch.gpu.device(1)``: the current device of the block."""

    def __init__(self, device: "torch.device | str | int | None"):
        self.index = _index(device)

    def __enter__(self) -> None:
        self.old = current_device()
        set_device(self.index)

    def __exit__(self, *_) -> None:
        set_device(self.old)


# ------------------------------------------------------------------------------------------------------ random numbers
def manual_seed(seed: int) -> None:
    load().gpu_manual_seed(current_device(), ctypes.c_uint64(seed))


def manual_seed_all(seed: int) -> None:
    for index in range(NUM_DEVICES):
        load().gpu_manual_seed(index, ctypes.c_uint64(seed))


def get_rng_state(device: "torch.device | str | int | None" = None) -> torch.Tensor:
    return torch.ops.pretended_gpu.get_rng_state(_index(device))


def set_rng_state(state: torch.Tensor, device: "torch.device | str | int | None" = None) -> None:
    torch.ops.pretended_gpu.set_rng_state(_index(device), state)


# -------------------------------------------------------------------------------------------------- streams and memory
class Stream(_CpuStream):
    def synchronize(self) -> None:
        synchronize()


class Event(_CpuEvent):
    def __init__(self, *_, **__): ...


def current_stream(device=None) -> Stream:
    return Stream()


def stream(stream) -> AbstractContextManager:
    return nullcontext()


def synchronize(device=None) -> None:
    torch.accelerator.synchronize(device)


def empty_cache() -> None: ...


def memory_allocated(device=None) -> int:
    """Bytes of all storages on the device."""
    return load().gpu_allocated(_index(device))


def max_memory_allocated(device=None) -> int:
    """Largest :func:`memory_allocated` since the last :func:`reset_peak_memory_stats`."""
    return load().gpu_peak(_index(device))


def reset_peak_memory_stats(device=None) -> None:
    load().gpu_reset_peak(_index(device))


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.bfloat16, torch.float16]
