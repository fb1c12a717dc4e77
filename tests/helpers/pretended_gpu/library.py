"""Compiles device.cpp on first use, and registers the device with torch."""

import ctypes
import fcntl
import hashlib
from functools import cache
from pathlib import Path

import torch

from tomoe_vllm.kernels.build import compile_library, compiler
from tomoe_vllm.kernels.cache import cache_folder

DEVICE_NAME = "gpu"
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-shared"]


@cache
def load() -> ctypes.CDLL:
    """The library, after torch knows the device: once in a process, and for its lifetime."""
    from tests.helpers.pretended_gpu import device_module, gru, process_group

    file = _build()
    torch.ops.load_library(file)
    library = ctypes.CDLL(str(file))
    library.gpu_allocated.restype = library.gpu_peak.restype = ctypes.c_int64
    torch.utils.rename_privateuse1_backend(DEVICE_NAME)
    torch._register_device_module(DEVICE_NAME, device_module)
    process_group.register()
    gru.register()
    return library


def _build() -> Path:
    source = Path(__file__).with_name("device.cpp")
    content = source.read_bytes() + source.with_name("runtime.h").read_bytes() + f"{torch.__version__} {FLAGS}".encode()
    library = cache_folder() / f"pretended-gpu-{hashlib.sha256(content).hexdigest()[:16]}.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    with (library.parent / "pretended-gpu.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two test processes: one compiles, the other waits
        if not library.exists():
            cxx = compiler()
            assert cxx is not None, "the pretended GPU is compiled on first use: install g++, or set CXX"
            compile_library(cxx, FLAGS, [source], library)
    return library
