"""The expert MLP on GPUs: which kernel runs a step, and whether the kernels may run at all.

A step of T tokens uses one of three execution paths, separated by the :class:`Thresholds` of the layer:

    T <= gather_tokens                    gather    each token reads the rows of its expert only (``gather.py``)
    grouped_tokens <= T <= max_tokens     grouped   sorted by expert, a GEMM over each expert's rows (``grouped.py``)
    otherwise                             dense     cuBLAS on all rows, with the expert mask in the activation kernel

``tomoe tune`` measures the thresholds and writes them to one table per kind of GPU and shape of layer
(:func:`table_file`), in the folder that ``TOMOE_TUNED_CONFIG_FOLDER`` names or else in the cache folder. A layer
without a table uses the dense path for every number of tokens (:data:`DENSE_ONLY`). The cost model predicts about 3
tokens for the first threshold, because from 4 tokens on the union of their experts is nearly all rows, and 640 for the
second, twice the ridge point of an H100 (docs/performance.md).

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

FOLDER_VARIABLE = "TOMOE_TUNED_CONFIG_FOLDER"
NEVER = 1_000_000_000
"""A number of tokens that no step has."""
WIDTH_TOLERANCE = 1 / 32
"""An entry serves experts that are wider than the measured ones by this share of the neurons. Under tensor parallelism
a rank's share of an expert differs from the mean by about that much."""
_KERNELS = Path(__file__).parents[2]


def device_name() -> str:
    """Torch's name of the current GPU, or ``cpu``: the key of validation records and tuned tables.

    vLLM's platform gives NVML's name, which under MIG is that of the whole GPU. A slice is another device: it has other
    rates, and other kernels may be the fastest.
    """
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


# ---------------------------------------------------------------------------------------------------- thresholds
@dataclass(frozen=True, kw_only=True, slots=True)
class LayerShape:
    """Sizes of one MLP on one tensor-parallel rank: what its tuned table is keyed by.

    D = ``hidden_size``, F = ``num_neurons`` (of the rank), N = ``num_experts``; ``width``: neurons of the widest
    expert (of the rank); ``num_matrices``: 3, or 2 without a gate; ``dtype``: of the weights.
    """

    hidden_size: int
    num_neurons: int
    num_experts: int
    width: int
    num_matrices: int
    dtype: torch.dtype

    @classmethod
    def of(cls, weights: ExpertTensors) -> "LayerShape":
        """The shape of a layer on this rank."""
        num_neurons = weights.masks.shape[1]
        return cls(
            hidden_size=weights.up.shape[1],
            num_neurons=num_neurons,
            num_experts=weights.masks.shape[0],
            width=weights.neuron_ids.shape[1],
            num_matrices=1 + weights.up.shape[0] // num_neurons,
            dtype=weights.up.dtype,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Thresholds:
    """Numbers of tokens that separate the execution paths.

    ``gather_tokens``: the largest for gather (0: never). ``grouped_tokens``: the smallest for grouped. ``max_tokens``:
    the largest at which ``tomoe tune`` checked the values of grouped; larger steps use the dense path.

    Raises ``ValueError`` for anything but integers from 0.
    """

    gather_tokens: int
    grouped_tokens: int
    max_tokens: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} is {value!r}")

    def path(self, num_tokens: int) -> str:
        """Execution path of a step of ``num_tokens``: "gather", "dense" or "grouped"."""
        if num_tokens <= self.gather_tokens:
            return "gather"
        return "grouped" if self.grouped_tokens <= num_tokens <= self.max_tokens else "dense"

    def sparse_range(self, smallest: int, largest: int) -> str | None:
        """The steps of ``smallest`` to ``largest`` tokens that use gather or grouped, in words, or None."""
        ranges = []
        if self.gather_tokens >= smallest:
            ranges.append(f"gather up to {self.gather_tokens} tokens")
        if self.grouped_tokens <= (end := min(self.max_tokens, largest)):
            ranges.append(f"grouped from {self.grouped_tokens} to {end} tokens")
        return " and ".join(ranges) or None


DENSE_ONLY = Thresholds(gather_tokens=0, grouped_tokens=NEVER, max_tokens=0)
"""Thresholds of a layer that was not tuned."""


def tuned_folder() -> Path:
    """The folder to which ``tomoe tune`` writes its tables, and from which they are read."""
    return Path(os.environ.get(FOLDER_VARIABLE) or cache_folder() / "tuned")


def table_file(shape: LayerShape, folder: Path | None = None) -> Path:
    """File of the thresholds of layers of ``shape``, for all widths of the experts, on this kind of GPU."""
    dtype = str(shape.dtype).removeprefix("torch.")
    name = re.sub(r"[^A-Za-z0-9-]+", "_", device_name())
    key = f"D={shape.hidden_size},F={shape.num_neurons},N={shape.num_experts},matrices={shape.num_matrices}"
    return (folder or tuned_folder()) / f"{key},dtype={dtype},device_name={name}.json"


def read_table(shape: LayerShape, folder: Path | None = None) -> dict[int, Thresholds]:
    """The measured thresholds by width of the experts. Empty without a table of the present kernels and versions.

    Raises ``ValueError`` for a file with other keys or values than expected.
    """
    file = table_file(shape, folder)
    if not file.exists():
        return {}
    names = [field.name for field in fields(Thresholds)]
    try:
        table = json.loads(file.read_text())
        if table["kernels"] != kernel_digest():
            return {}
        entries = {int(width): Thresholds(**values) for width, values in table["widths"].items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{file} is no table of `tomoe tune`: it must hold kernels, and widths with {', '.join(names)}, integers "
            f"from 0 ({error}). Delete it, or run: tomoe tune"
        ) from error
    return entries


def write_table(shape: LayerShape, thresholds: Thresholds, folder: Path | None = None) -> Path:
    """Add the thresholds of ``shape`` to its table, atomically. Entries of other kernels or versions are dropped."""
    file = table_file(shape, folder)
    try:
        entries = read_table(shape, folder)
    except ValueError:
        entries = {}
    entries[shape.width] = thresholds
    widths = {str(width): asdict(entry) for width, entry in sorted(entries.items())}
    _write_json(file, {"kernels": kernel_digest(), "widths": widths})
    return file


@cache
def load_thresholds(shape: LayerShape) -> Thresholds:
    """The thresholds of a layer, :data:`DENSE_ONLY` if none were measured.

    They are those of the narrowest measured experts that are at least as wide as the layer's
    (less :data:`WIDTH_TOLERANCE`): for narrower experts both sparse paths only become faster. Raises ``ValueError`` as
    :func:`read_table` does.
    """
    entries = read_table(shape)
    wide_enough = [width for width in entries if width + WIDTH_TOLERANCE * shape.num_neurons >= shape.width]
    return entries[min(wide_enough)] if wide_enough else DENSE_ONLY


def _write_json(file: Path, value: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(f".{os.getpid()}.part")
    unfinished.write_text(json.dumps(value, indent=1) + "\n")
    unfinished.replace(file)


# ------------------------------------------------------------------------------------------------------------- op
def expert_mlp_cuda(
    hidden_states: Tensor, expert_ids: Tensor, weights: ExpertTensors, path: str | None = None
) -> Tensor:
    """The expert MLP of T tokens on a GPU. Captures into a CUDA graph.

    ``hidden_states``: [T, D] float32, bfloat16 or float16, columns contiguous. ``expert_ids``: [T] int32 or int64.
    ``weights``: contiguous tensors, floats of the dtype of ``hidden_states`` (masks may be uint8). ``path``: by default
    the one that the layer's thresholds select. Returns [T, D], without W_down's bias.
    """
    # The kernels compute addresses under these conditions.
    assert hidden_states.stride(1) == 1
    assert all(t.is_contiguous() for t in (weights.up, weights.down, weights.neuron_ids, weights.widths))
    assert weights.neuron_ids.dtype == weights.widths.dtype == torch.int32
    # Imported here because they need Triton, and CPUs import this module for the thresholds.
    from tomoe_vllm.kernels.expert_activation.triton import expert_activation_triton
    from tomoe_vllm.kernels.expert_mlp.triton.gather import expert_mlp_gather
    from tomoe_vllm.kernels.expert_mlp.triton.grouped import expert_mlp_grouped

    path = path or load_thresholds(LayerShape.of(weights)).path(hidden_states.shape[0])
    if path == "gather":
        return expert_mlp_gather(hidden_states, expert_ids, weights)
    if path == "grouped":
        return expert_mlp_grouped(hidden_states, expert_ids, weights)
    projected = F.linear(hidden_states, weights.up, weights.up_bias)
    return expert_activation_triton(projected, expert_ids, weights.masks, weights.activation) @ weights.down


def warm_up_sizes(weights: ExpertTensors, max_tokens: int) -> list[int]:
    """Numbers of tokens, up to ``max_tokens``, that between them launch every kernel binary of this layer.

    A binary depends on the tile sizes, on the sizes and strides of the tensors, and on whether T * D is a multiple of
    16 (gather). All sizes of gather are named, one of the dense path, and one for each configuration of grouped.
    """
    from tomoe_vllm.kernels.expert_mlp.triton.grouped import config_of

    thresholds, sizes = load_thresholds(LayerShape.of(weights)), {}
    for num_tokens in range(max_tokens, 0, -1):
        path = thresholds.path(num_tokens)
        kind = num_tokens if path == "gather" else config_of(weights, num_tokens) if path == "grouped" else None
        sizes[path, kind] = num_tokens
    return sorted(sizes.values())


_warmed_up: set[tuple] = set()


def warm_up(weights: ExpertTensors, max_tokens: int) -> None:
    """Compile what steps of up to ``max_tokens`` tokens launch, so that no request waits for a compiler.

    vLLM runs a few numbers of tokens before it serves, which are not all that differ here. Layers of a shape that was
    warmed up in this process are skipped. Call it outside the capture of a CUDA graph.
    """
    key = LayerShape.of(weights), weights.activation, weights.up_bias is None, weights.up.device, max_tokens
    if key in _warmed_up:
        return
    for num_tokens in warm_up_sizes(weights, max_tokens):
        hidden_states = weights.up.new_zeros(num_tokens, weights.up.shape[1])
        expert_mlp_cuda(hidden_states, torch.zeros(num_tokens, dtype=torch.int64, device=weights.up.device), weights)
    _warmed_up.add(key)


@cache
def register() -> None:
    """Make :func:`expert_mlp_cuda` the implementation of ``tomoe::expert_mlp`` for CUDA tensors."""
    LIBRARY.impl("expert_mlp", lambda x, ids, *weights: expert_mlp_cuda(x, ids, ExpertTensors(*weights)), "CUDA")


# ------------------------------------------------------------------------------------------------------ validation
@dataclass(frozen=True, kw_only=True, slots=True)
class KernelValidation:
    """Result of ``tomoe doctor`` on one kind of GPU.

    ``device``: :func:`device_name`. ``failures``: one line per check that failed. ``kernels``: the
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
    """File of the validation record of ``device`` (:func:`device_name`, such as "NVIDIA A100-SXM4-80GB")."""
    return cache_folder() / f"doctor-{re.sub(r'[^A-Za-z0-9]+', '_', device)}.json"


def write_validation(device: str, failures: list[str]) -> Path:
    """Write the validation record of the present kernels, atomically. No failure means that they agree."""
    record = KernelValidation(device=device, agrees=not failures, failures=failures, kernels=kernel_digest())
    file = validation_file(device)
    _write_json(file, asdict(record))
    return file


def read_validation(device: str) -> KernelValidation | None:
    """The validation record of ``device``, or None if there is none for the present kernels and versions."""
    try:
        record = KernelValidation(**json.loads(validation_file(device).read_text()))
    except (OSError, ValueError, TypeError):
        return None
    return record if record.kernels == kernel_digest() else None
