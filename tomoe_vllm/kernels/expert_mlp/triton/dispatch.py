"""The expert MLP on GPUs: which kernel runs a step, and whether the kernels may run at all.

A step of T tokens uses one of three execution paths, separated by two :class:`Thresholds` per kind of GPU:

    T <= gather_tokens    gather    each token reads the rows of its expert only (``gather.py``)
    between               dense     cuBLAS on all rows, with the expert mask in the activation kernel
    T >= grouped_tokens   grouped   tokens sorted by expert, a GEMM over each expert's rows (``grouped.py``)

``tomoe tune`` measures the thresholds and writes them to ``<device name>.json``, in the folder that
``TOMOE_TUNED_CONFIG_FOLDER`` names or else in the cache folder. A device without such a file uses ``configs/``; its
``default.json`` selects the dense path for every number of tokens. The roofline model predicts about 3 tokens for the
first threshold, because from 4 tokens on the union of their experts is nearly all rows, and 640 for the second, twice
the ridge point of an H100 (docs/performance.md).

The kernels run only after ``tomoe doctor`` has validated them on this kind of GPU. Its result is the validation record
(:class:`KernelValidation`), one JSON file per kind of GPU in the cache folder:

    no record, or one of other kernels or versions    the shared layout is unavailable
    record.agrees                                     the shared layout is available
    not record.agrees                                 it is unavailable; ``record.failures`` says why

``layers/mlp/layout.py`` reads the record when it chooses the layout, and calls :func:`register` if the record agrees.
"""

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tomoe_vllm.kernels.cache import cache_folder
from tomoe_vllm.kernels.ops import LIBRARY, ExpertTensors

SHIPPED_FOLDER = Path(__file__).parent / "configs"
FOLDER_VARIABLE = "TOMOE_TUNED_CONFIG_FOLDER"
_KERNELS = Path(__file__).parents[2]


# ---------------------------------------------------------------------------------------------------- thresholds
@dataclass(frozen=True, kw_only=True, slots=True)
class Thresholds:
    """Largest number of tokens for gather (0: never), and smallest number of tokens for grouped."""

    gather_tokens: int
    grouped_tokens: int

    def path(self, num_tokens: int) -> str:
        """Execution path of a step of ``num_tokens``: "gather", "dense" or "grouped"."""
        if num_tokens <= self.gather_tokens:
            return "gather"
        return "grouped" if num_tokens >= self.grouped_tokens else "dense"


def device_name() -> str:
    """Name of this GPU, or ``cpu``, in a form fit for a file name."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()


def tuned_folder() -> Path:
    """The folder to which ``tomoe tune`` writes thresholds, and from which they are read."""
    return Path(os.environ.get(FOLDER_VARIABLE) or cache_folder() / "tuned")


@cache
def load_thresholds() -> Thresholds:
    """The thresholds of this device. Raises ``ValueError`` for a file with other keys or values than expected."""
    candidates = [folder / f"{device_name()}.json" for folder in (tuned_folder(), SHIPPED_FOLDER)]
    file = next((file for file in candidates if file.exists()), SHIPPED_FOLDER / "default.json")
    values = json.loads(file.read_text())
    names = [field.name for field in fields(Thresholds)]
    if sorted(values) != sorted(names) or not all(isinstance(value, int) and value >= 0 for value in values.values()):
        raise ValueError(f"{file} holds {values}; it must hold {', '.join(names)}, integers from 0. Run: tomoe tune")
    return Thresholds(**values)


# ------------------------------------------------------------------------------------------------------------- op
def expert_mlp_cuda(
    hidden_states: Tensor, expert_ids: Tensor, weights: ExpertTensors, path: str | None = None
) -> Tensor:
    """The expert MLP of T tokens on a GPU. Captures into a CUDA graph.

    ``hidden_states``: [T, D] float32, bfloat16 or float16, columns contiguous. ``expert_ids``: [T] int32 or int64.
    ``weights``: contiguous tensors, floats of the dtype of ``hidden_states`` (masks may be uint8). ``path``: by default
    the one that the device's thresholds select. Returns [T, D], without W_down's bias.
    """
    # The kernels compute addresses under these conditions.
    assert hidden_states.stride(1) == 1
    assert all(t.is_contiguous() for t in (weights.up, weights.down, weights.neuron_ids, weights.widths))
    assert weights.neuron_ids.dtype == weights.widths.dtype == torch.int32
    # Imported here because they need Triton, and CPUs import this module for the thresholds.
    from tomoe_vllm.kernels.expert_activation.triton import expert_activation_triton
    from tomoe_vllm.kernels.expert_mlp.triton.gather import expert_mlp_gather
    from tomoe_vllm.kernels.expert_mlp.triton.grouped import expert_mlp_grouped

    path = path or load_thresholds().path(hidden_states.shape[0])
    if path == "gather":
        return expert_mlp_gather(hidden_states, expert_ids, weights)
    if path == "grouped":
        return expert_mlp_grouped(hidden_states, expert_ids, weights)
    projected = F.linear(hidden_states, weights.up, weights.up_bias)
    return expert_activation_triton(projected, expert_ids, weights.masks, weights.activation) @ weights.down


@cache
def register() -> None:
    """Make :func:`expert_mlp_cuda` the implementation of ``tomoe::expert_mlp`` for CUDA tensors.

    Raises ``ValueError`` for a bad thresholds file: here, while the model is built, and not in its first step.
    """
    load_thresholds()
    LIBRARY.impl("expert_mlp", lambda x, ids, *weights: expert_mlp_cuda(x, ids, ExpertTensors(*weights)), "CUDA")


# ------------------------------------------------------------------------------------------------------ validation
@dataclass(frozen=True, kw_only=True, slots=True)
class KernelValidation:
    """Result of ``tomoe doctor`` on one kind of GPU.

    ``device``: torch's name of the GPU. ``failures``: one line per check that failed. ``kernels``: the
    :func:`kernel_digest` of the kernels that were checked.
    """

    device: str
    agrees: bool
    failures: list[str]
    kernels: str


@cache
def kernel_digest() -> str:
    """Digest of everything that a validation depends on: the kernels' sources and the versions of Triton and torch."""
    digest = hashlib.sha256()
    for file in sorted([*_KERNELS.glob("*/triton.py"), *_KERNELS.glob("*/triton/*.py")]):
        digest.update(file.read_bytes())
    for package in ("triton", "torch"):
        try:
            digest.update(f"{package} {version(package)}".encode())
        except PackageNotFoundError:
            digest.update(f"no {package}".encode())
    return digest.hexdigest()[:16]


def validation_file(device: str) -> Path:
    """File of the validation record of ``device`` (torch's name, such as "NVIDIA A100-SXM4-80GB")."""
    return cache_folder() / f"doctor-{re.sub(r'[^A-Za-z0-9]+', '_', device)}.json"


def write_validation(device: str, failures: list[str]) -> Path:
    """Write the validation record of the present kernels, atomically. No failure means that they agree."""
    record = KernelValidation(device=device, agrees=not failures, failures=failures, kernels=kernel_digest())
    file = validation_file(device)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}.part")
    unfinished.write_text(json.dumps(asdict(record), indent=1) + "\n")
    unfinished.replace(file)
    return file


def read_validation(device: str) -> KernelValidation | None:
    """The validation record of ``device``, or None if there is none for the present kernels and versions."""
    try:
        record = KernelValidation(**json.loads(validation_file(device).read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return record if record.kernels == kernel_digest() else None
