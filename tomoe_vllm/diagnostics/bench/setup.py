"""How ``tomoe bench`` runs its two engines on a device: vLLM's arguments, the sizes to measure, and their order.

On a CPU both engines run in float32 and eager mode, at the same time. On a GPU they run as users serve them: bfloat16,
compiled, with CUDA graphs and asynchronous scheduling. There the engines share one device, so each gets at most
``MAX_SHARE`` of its memory; if a model does not fit twice, they run one after the other. Both get a KV cache of the
same number of bytes.

No figure of a GPU was ever measured with it.
"""

import json
import math
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from tomoe_vllm.hf.configuration_tomoe import block_shape
from tomoe_vllm.hf.register import register_configs

DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
"""By device. vLLM's attention on GPUs (FlashAttention) does not take float32."""
ORDERS = ("auto", "interleaved", "sequential")
BATCHES = (1, 4, 16, 64)
MAX_SHARE = 0.42
"""Largest share of a GPU's memory for each of two engines; the rest is for CUDA contexts and graphs."""
USABLE = 0.92
"""Share of the free memory that engines may take in all."""
WORKSPACE_BYTES = 3 << 30
"""Activations, CUDA graphs and the CUDA context of one engine. Estimated, not measured."""
KV_TOKENS = 64 * 144
"""Tokens of the KV cache: 64 sequences of 81 tokens in blocks of up to 128, or one of the longest prompt."""
CPU_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # glibc keeps freed memory: mapping and zeroing each large temporary anew would slow the dense model most.
    "MALLOC_MMAP_THRESHOLD_": "4000000000",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
}
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the worker calls each step itself, to time it
    "VLLM_LOGGING_LEVEL": "WARNING",
}
COMMON_ARGUMENTS = {
    "skip_tokenizer_init": True,
    "max_num_seqs": max(BATCHES),
    "enable_prefix_caching": False,
    "disable_log_stats": True,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSetup:
    """How both engines run, and what is measured.

    ``arguments``: of ``vllm.LLM``. ``environment``: variables of the engine's process. ``prompts``: lengths for
    prefill. ``decode_steps``: steps in one round of decoding. ``norms``: RMSNorm kernels of the dense engine
    (``worker.make_norm_switchable``). ``is_stepwise``: engines alternate step by step, not round by round.
    """

    device: str
    is_interleaved: bool
    arguments: dict[str, Any]
    environment: dict[str, str]
    prompts: tuple[int, ...]
    decode_steps: int
    norms: tuple[str, ...]
    is_stepwise: bool
    baseline: str
    kv_cache_bytes: int
    batches: tuple[int, ...] = BATCHES
    decode_prompt: int = 16


def choose_device(device: str | None) -> str:
    """``device``, or by default the one that the installed vLLM runs on.

    Raises ``ValueError`` for another one: each build of vLLM runs on one kind of device.
    """
    if device not in (None, *DTYPES):
        raise ValueError(f"--device is {device!r}; it must be one of {', '.join(DTYPES)}")
    if find_spec("vllm") is None:  # the part "op" needs no vLLM on a GPU
        return device or ("cuda" if torch.cuda.is_available() else "cpu")
    from vllm.platforms import current_platform

    if current_platform.is_cuda():
        if device == "cpu":
            raise ValueError(
                "--device cpu needs vLLM's CPU build, and this is the CUDA build; use a second environment: "
                "make install VENV=.venv-cpu EXTRA=cpu"
            )
        return "cuda"
    if device == "cuda":
        raise ValueError(
            f"--device cuda: vLLM runs on {current_platform.device_name or 'no device'} here; it needs vLLM's CUDA "
            "build and an NVIDIA GPU that its driver offers (nvidia-smi -L). Run: tomoe doctor"
        )
    return "cpu"


def engine_setup(device: str, folders: dict[str, Path], order: str) -> EngineSetup:
    """The setup for the models in ``folders`` ("dense", "tomoe") on ``device``. Raises as :func:`cuda_setup`."""
    if order not in ORDERS:
        raise ValueError(f"--order is {order!r}; it must be one of {', '.join(ORDERS)}")
    if device == "cpu":
        return cpu_setup(order)
    sizes = {name: weight_bytes(folder) for name, folder in folders.items()}
    return cuda_setup(gpu_memory(), sizes, AutoConfig.from_pretrained(folders["dense"]), order)


def cpu_setup(order: str = "auto") -> EngineSetup:
    """Float32 and eager mode; two engines at once unless ``order`` is "sequential"."""
    return EngineSetup(
        device="cpu",
        is_interleaved=order != "sequential",
        arguments=COMMON_ARGUMENTS
        | {
            "dtype": DTYPES["cpu"],
            "enforce_eager": True,
            "max_model_len": 1536,
            "max_num_batched_tokens": 1024,
            "async_scheduling": False,
        },
        environment=ENVIRONMENT | CPU_ENVIRONMENT,
        prompts=(256, 1024),
        decode_steps=16,
        norms=("compiled", "shipped"),
        is_stepwise=True,
        baseline="the dense model with vLLM's compiled RMSNorm, as ToMoE runs it",
        kv_cache_bytes=1 << 30,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuMemory:
    """Bytes of a GPU, and its name."""

    name: str
    total: int
    free: int


def gpu_memory() -> GpuMemory:
    """Memory of the first visible GPU, asked in a process of its own so that this one keeps none of it.

    Raises ``RuntimeError`` if CUDA fails.
    """
    code = (
        "import json, torch; free, total = torch.cuda.mem_get_info(); "
        "print(json.dumps({'name': torch.cuda.get_device_name(), 'total': total, 'free': free}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"CUDA failed: {(result.stderr.strip() or 'no message').splitlines()[-1]}")
    return GpuMemory(**json.loads(result.stdout.splitlines()[-1]))


def cuda_setup(memory: GpuMemory, needed_bytes: dict[str, int], config: PreTrainedConfig, order: str) -> EngineSetup:
    """bfloat16, compiled, with CUDA graphs.

    Args:
        memory: of the GPU, before the engines start.
        needed_bytes: bytes of each model's weights, by engine.
        config: of the dense model.
        order: "auto" runs two engines at once if both fit in their share of ``memory``.

    Raises:
        ValueError: an engine does not fit, with its size.
    """
    prompts = tuple(n for n in (256, 1024, 4096) if n < config.max_position_embeddings)
    longest = max(prompts, default=128)
    kv_bytes = kv_cache_bytes(config, KV_TOKENS)
    largest = max(needed_bytes.values()) + kv_bytes + WORKSPACE_BYTES
    share = min(MAX_SHARE, _floor(USABLE * memory.free / memory.total / 2))
    is_interleaved = largest <= share * memory.total if order == "auto" else order == "interleaved"
    if not is_interleaved:
        share = min(USABLE, _floor(USABLE * memory.free / memory.total))
    if largest > share * memory.total:
        what = "two engines at once; use --order sequential" if is_interleaved else "one engine"
        raise ValueError(
            f"{memory.name} has {memory.free / 2**30:.1f} of {memory.total / 2**30:.1f} GiB free, and an engine needs "
            f"about {largest / 2**30:.1f} GiB: not enough for {what}"
        )
    return EngineSetup(
        device="cuda",
        is_interleaved=is_interleaved,
        arguments=COMMON_ARGUMENTS
        | {
            "dtype": DTYPES["cuda"],
            "enforce_eager": False,
            "max_model_len": longest + 1,
            "max_num_batched_tokens": max(longest, 1024),
            "gpu_memory_utilization": share,
            "kv_cache_memory_bytes": kv_bytes,
        },
        environment=ENVIRONMENT,
        prompts=prompts,
        decode_steps=64,
        norms=("shipped",),
        is_stepwise=False,
        baseline="the dense model as vLLM ships it",
        kv_cache_bytes=kv_bytes,
    )


def _floor(share: float) -> float:
    return math.floor(share * 100) / 100


def kv_cache_bytes(config: PreTrainedConfig, num_tokens: int, itemsize: int = 2) -> int:
    """Bytes of the KV cache of a dense model for ``num_tokens``."""
    shape = block_shape(config)
    return 2 * itemsize * config.num_hidden_layers * shape.num_kv_heads * shape.head_dim * num_tokens


def weight_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's weights on a GPU: of its files, and of the matrices that the fused layout adds."""
    files = [file for pattern in ("*.safetensors", "*.bin") for file in folder.glob(pattern)]
    register_configs()
    config = AutoConfig.from_pretrained(folder)
    experts = 0
    if getattr(config, "expert_layout", None) == "fused":
        experts = 2 * 3 * config.hidden_size * config.num_experts * sum(config.expert_intermediate_sizes)
    return sum(file.stat().st_size for file in files) + experts
