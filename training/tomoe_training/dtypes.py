"""Device of a command, and dtypes on different hardware."""

import torch
from torch import Tensor

EVALUATION_DTYPES = ("auto", "float32", "bfloat16", "float16")


def default_device() -> torch.device:
    """The device of a command that runs in one process: the current GPU, or else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor without waiting for the work that the device still has to do."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 GEMMs are faster than float32 here: GPUs, and CPUs with AMX or AVX512-BF16.

    On other CPUs they are about five times slower.
    """
    if device.type != "cpu":
        return True
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(unit) for unit in ("amx_bf16", "avx512_bf16"))


def training_dtype(name: str, device: torch.device) -> torch.dtype:
    """Dtype of the frozen base for a run's ``dtype``: ``auto`` is bfloat16 where that is fast."""
    if name == "auto":
        name = "bfloat16" if has_fast_bfloat16(device) else "float32"
    return getattr(torch, name)


def evaluation_dtype(name: str, stored: torch.dtype | None, device: torch.device) -> str:
    """Name of the dtype to evaluate in: ``auto`` is float32 on CPUs, and the ``stored`` dtype on GPUs."""
    if name != "auto":
        return name
    return "float32" if device.type == "cpu" or stored is None else str(stored).removeprefix("torch.")
