"""The layout of the expert MLP's weights in memory, and the lists of each expert's neurons.

What each part of it is worth: benchmarks/weight_layout.py.
"""

import mmap
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
ARENA = 256 << 20
"""Bytes mapped at once. They take no memory until they are written to."""
LINE_BYTES = 64
PANEL_WIDTHS = (96, 64, 48, 32)
"""Columns of a panel of W_down, best first; at most ``kPanelColumns`` of simd/tuning.h."""


def empty_rows(num_rows: int, hidden_size: int) -> Tensor:
    """Uninitialized [num_rows, hidden_size] of the default dtype on the default device; a row is a neuron.

    On a CPU the row stride is padded by one cache line when it is a multiple of 512 bytes, to avoid conflicts in the
    sets of the L1 cache, and the memory is advised to use 2 MB pages: an expert's rows are spread over the matrix, and
    with 4 KB pages many reads would miss the TLB.
    """
    if torch.get_default_device().type != "cpu":
        return torch.empty(num_rows, hidden_size)
    line = LINE_BYTES // torch.get_default_dtype().itemsize
    stride = hidden_size + (line if hidden_size % (8 * line) == 0 else 0)
    return _empty(num_rows * stride).view(num_rows, stride)[:, :hidden_size]


def empty_panels(num_rows: int, hidden_size: int, widths: Sequence[int] = PANEL_WIDTHS) -> Tensor:
    """Uninitialized W_down on a CPU: [num_rows, panels, hidden_size / panels], of which each panel is contiguous.

    A thread works on one panel of columns at a time and reads an expert's rows of it as one stream. The width is the
    first of ``widths`` that divides ``hidden_size`` into a number of panels that is a multiple of the threads, else
    the first that divides it. On another device, or where none does, the result is that of :func:`empty_rows`.
    """
    widths = [width for width in widths if hidden_size % width == 0]
    if torch.get_default_device().type != "cpu" or not widths:
        return empty_rows(num_rows, hidden_size)
    num_threads = torch.get_num_threads()
    width = next((width for width in widths if hidden_size // width % num_threads == 0), widths[0])
    return _empty(num_rows * hidden_size).view(hidden_size // width, num_rows, width).transpose(0, 1)


class _Arena:
    """A bump allocator on mappings with 2 MB pages, each freed with the last tensor in it.

    torch has no allocator for huge pages, and advice on memory from malloc does not change pages that were used before.
    One mapping per weight would be simpler: rounded up to 2 MB it takes 17 % more memory (the 30 layers of 135m), not
    rounded up it leaves a third of the weights in 4 KB pages.
    """

    def __init__(self) -> None:
        self.memory: Callable[[], mmap.mmap | None] = lambda: None
        self.begin = self.end = 0

    def empty(self, size: int) -> Tensor:
        """[size] of the default dtype, aligned to a cache line."""
        dtype = torch.get_default_dtype()
        num_bytes = size * dtype.itemsize
        memory = self.memory()
        if memory is None or self.begin + num_bytes > self.end:
            room = max(num_bytes, ARENA)
            memory = mmap.mmap(-1, room + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(mmap.MADV_HUGEPAGE)
            self.memory = weakref.ref(memory)
            self.begin = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % HUGE_PAGE
            self.end = self.begin + room
        tensor = torch.frombuffer(memory, dtype=dtype, count=size, offset=self.begin)
        self.begin += -(-num_bytes // LINE_BYTES) * LINE_BYTES
        return tensor


_ARENA = _Arena()


def _empty(size: int) -> Tensor:
    """[size] of the default dtype on the CPU, in huge pages where the system has them."""
    return _ARENA.empty(size) if hasattr(mmap, "MADV_HUGEPAGE") else torch.empty(size, device="cpu")


def neuron_order(expert_masks: Tensor) -> Tensor:
    """An order of the neurons in which each expert's form few contiguous runs: [F] int64.

    ``expert_masks``: [N, F], non-zero where an expert keeps a neuron. Neurons are sorted by the index of their column
    in the reflected Gray code: those with equal columns become neighbours, and other neighbours differ in few experts.
    Contiguous rows are read faster than rows with gaps, into which hardware prefetching reads in vain.
    """
    digits = (expert_masks != 0).long().cumsum(dim=0) % 2  # Gray code to binary
    order = torch.arange(expert_masks.shape[1], device=expert_masks.device)
    for digit in reversed(digits):
        order = order[digit[order].argsort(stable=True)]
    return order


def neuron_lists(expert_masks: Tensor) -> tuple[Tensor, Tensor]:
    """The neurons of each expert as sorted lists.

    ``expert_masks``: [N, F], non-zero where an expert keeps a neuron. Returns ``neuron_ids`` [N, W] int32, W the
    widest expert's count (at least 1), padded with a valid row, and ``widths`` [N] int32. Under tensor parallelism
    F is a rank's share and widths differ between experts.
    """
    is_kept = expert_masks != 0
    widths = is_kept.sum(dim=1)
    # Kept neurons first, in order: a stable sort of "not kept".
    order = (~is_kept).to(torch.uint8).sort(dim=1, stable=True).indices
    neuron_ids = order[:, : max(1, int(widths.max()))].to(torch.int32).contiguous()
    return neuron_ids, widths.to(torch.int32)
