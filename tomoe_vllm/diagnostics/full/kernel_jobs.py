"""Jobs of the part "kernels": values, CUDA graphs and times of each kernel, and rates of the device."""

from collections.abc import Iterator
from dataclasses import asdict
from functools import cache

import torch
import triton
from torch import Tensor

from tomoe_vllm.diagnostics.device import CudaDevice, Device, InterpretedDevice
from tomoe_vllm.diagnostics.full.plan import Job, Options
from tomoe_vllm.diagnostics.full.report import DONE, FAILED, PASSED, Result
from tomoe_vllm.diagnostics.gate_checks import check_activation, check_route, check_value_mask
from tomoe_vllm.diagnostics.kernel_checks import Check, Layer, is_interpreted, run_check
from tomoe_vllm.diagnostics.layers import PATHS, LayerSizes
from tomoe_vllm.diagnostics.roofline import Chip


@cache
def device() -> Device:
    """The device of this process."""
    return InterpretedDevice() if is_interpreted() else CudaDevice()


@cache
def chip() -> Chip | None:
    """Measured rates of the GPU, or None in the interpreter."""
    return None if isinstance(gpu := device(), InterpretedDevice) else gpu.measured_chip()


_layers: dict[tuple[str, str], Layer] = {}


def layer_of(sizes: LayerSizes, dtype: str) -> Layer:
    """A random layer. Only the latest is kept: consecutive jobs are about one layer."""
    if (key := (sizes.name, dtype)) not in _layers:
        _layers.clear()
        _layers[key] = Layer.random(sizes.mlp, sizes.activation, sizes.has_bias, getattr(torch, dtype), device().type)
    return _layers[key]


def run(job: Job, options: Options) -> Iterator[Result]:
    """The result of one job."""
    if job.kind == "rates":
        yield Result(part=job.part, name=job.name, status=DONE, values=rates())
        return
    sizes = options.layers()[job.arguments["layer"]]
    check = run_kernel(sizes, **{name: value for name, value in job.arguments.items() if name != "layer"})
    yield Result(
        part=job.part,
        name=job.name,
        status=PASSED if check.agrees else FAILED,
        reason=None if check.agrees else check.reason(),
        values=asdict(check) | {"layer": sizes.name},
    )


def run_kernel(sizes: LayerSizes, dtype: str, path: str, num_tokens: int, routing: str) -> Check:
    """Check and time one kernel."""
    if path == "route":
        return check_route(sizes.gates, num_tokens, getattr(torch, dtype), device())
    if path == "mask_values":
        return check_value_mask(sizes.gates, num_tokens, getattr(torch, dtype), device())
    layer = layer_of(sizes, dtype)
    if path == "activation":
        return check_activation(layer, num_tokens, device())
    assert path in PATHS
    return run_check(layer, path, num_tokens, routing, device(), chip())


@triton.jit
def nothing_kernel(pointer):
    """Grid (1,): nothing. Its time is that of a launch."""


def rates() -> dict:
    """What this GPU is, and its rates: of a copy, of a GEMM, and of kernels that wait for each other in a graph."""
    gpu = device()
    assert isinstance(gpu, CudaDevice)
    measured = chip()
    assert measured is not None
    one, vector = torch.zeros(1, device=gpu.type), torch.zeros(4096, device=gpu.type, dtype=torch.bfloat16)

    def launch_nothing() -> Tensor:
        nothing_kernel[(1,)](one)
        return one

    nothing_ms = gpu.milliseconds_per_call(launch_nothing, 200)
    add_ms = gpu.milliseconds_per_call(lambda: vector.add_(1), 200)
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "copy_bytes_per_s": measured.bandwidth,
        "bfloat16_gemm_flops": measured.flops,
        "empty_kernel_us": None if nothing_ms is None else 1e3 * nothing_ms,
        "small_kernel_us": None if add_ms is None else 1e3 * add_ms,
    }
