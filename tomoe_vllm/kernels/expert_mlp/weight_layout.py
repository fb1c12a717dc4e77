"""How the op's weights lie in memory: one row per neuron, and which rows are whose."""

import mmap
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20
ARENA = 256 << 20
"""Bytes mapped at once: address space, until they are written to."""
LINE_BYTES = 64
"""A cache line."""
PANEL_WIDTHS = (96, 64, 48, 32)
"""Columns of a panel of W_down, at most ``kPanelColumns`` of down.h."""


def empty_rows(num_rows: int, hidden_size: int) -> Tensor:
    """Uninitialized [num_rows, hidden_size] of the default dtype, on the default device, for the weights of neurons.

    On a CPU rows that would lie a multiple of 8 cache lines apart lie one more line apart: they share a few sets of
    the L1 cache and would push each other out. There they also lie in 2 MB pages where Linux gives them: an expert's
    rows are all over the matrix, and with 4 KB pages a token would wait for many address translations (docs/notebook).
    """
    if torch.get_default_device().type != "cpu":
        return torch.empty(num_rows, hidden_size)
    line = LINE_BYTES // torch.get_default_dtype().itemsize
    stride = hidden_size + (line if hidden_size % (8 * line) == 0 else 0)
    return _empty(num_rows * stride).view(num_rows, stride)[:, :hidden_size]


def empty_panels(num_rows: int, hidden_size: int, widths: Sequence[int] = PANEL_WIDTHS) -> Tensor:
    """The same for W_down on a CPU: [num_rows, panels, hidden_size / panels], each panel's rows one after the other.

    A thread takes a panel of columns at a time, and reads of it an expert's rows as one stream; panels are as wide as
    the kernel likes them (``down.h``) and, if they can be, as many as all threads have equal shares of. On another
    device, or where none of ``widths`` (best first) divides ``hidden_size``, it is :func:`empty_rows`.
    """
    widths = [width for width in widths if hidden_size % width == 0]
    if torch.get_default_device().type != "cpu" or not widths:
        return empty_rows(num_rows, hidden_size)
    num_threads = torch.get_num_threads()
    width = next((width for width in widths if hidden_size // width % num_threads == 0), widths[0])
    return _empty(num_rows * hidden_size).view(hidden_size // width, num_rows, width).transpose(0, 1)


class _Arena:
    """Memory in huge pages, of which weights take theirs one after the other: each on its own would end in small ones.

    It is freed with the last tensor in it.
    """

    def __init__(self) -> None:
        self.memory: Callable[[], mmap.mmap | None] = lambda: None
        self.begin = self.end = 0

    def empty(self, size: int) -> Tensor:
        """[size] of the default dtype, from a cache line's beginning on."""
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
    """[size] on the CPU. What malloc gives may have been used before, and then keeps its small pages."""
    return _ARENA.empty(size) if hasattr(mmap, "MADV_HUGEPAGE") else torch.empty(size, device="cpu")


def neuron_order(expert_masks: Tensor) -> Tensor:
    """[F] int64: an order of the neurons in which each expert's lie in few runs.

    ``expert_masks``: [N, F], non-zero where an expert keeps a neuron. Neurons of the same experts come together, and
    neighbours differ in few experts: sorted by their place in the reflected Gray code. A run of rows is read faster
    than rows with gaps, which the hardware's prefetching reads for nothing.
    """
    place = (expert_masks != 0).long().cumsum(dim=0) % 2  # the binary digits that belong to a Gray code's
    order = torch.arange(expert_masks.shape[1], device=expert_masks.device)
    for digit in reversed(place):
        order = order[digit[order].argsort(stable=True)]
    return order


def neuron_lists(expert_masks: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted rows of each expert, as the op takes them.

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
