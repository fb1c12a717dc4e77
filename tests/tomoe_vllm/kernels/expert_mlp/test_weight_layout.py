"""The layout of the weights in memory, and the lists of neurons."""

import re
from pathlib import Path

import psutil
import pytest
import torch

from tomoe_vllm.kernels.expert_mlp.weight_layout import HUGE_PAGE, empty_panels, empty_rows, neuron_lists, neuron_order


@pytest.mark.parametrize(
    ("hidden", "threads", "panels"), [(576, 2, 6), (576, 4, 12), (2048, 2, 32), (576, 64, 6), (50, 2, 0), (96, 2, 2)]
)
def test_panels_are_a_multiple_of_the_threads_where_they_can_be(monkeypatch, hidden, threads, panels):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    rows = empty_panels(7, hidden)
    assert rows.shape == ((7, panels, hidden // panels) if panels else (7, hidden))
    assert not panels or rows[:, 0].is_contiguous()
    assert torch.equal(rows.fill_(2).flatten(1), torch.full((7, hidden), 2.0))


def test_neuron_lists_are_sorted_and_padded_with_a_valid_row():
    ids, widths = neuron_lists(torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0]]))
    assert widths.tolist() == [2, 0, 3]
    assert widths.dtype == ids.dtype == torch.int32
    assert ids.shape == (3, 3)
    assert ids[0, :2].tolist() == [1, 3]
    assert ids[2].tolist() == [0, 1, 2]
    assert ids.max() < 4


def test_order_of_neurons_gives_experts_few_runs():
    generator = torch.Generator().manual_seed(4)
    masks = (torch.rand(8, 2000, generator=generator) < 0.5).float()
    order = neuron_order(masks)
    assert order.sort().values.tolist() == list(range(2000))
    starts = (masks[:, order].diff(dim=1) == 1).sum(dim=1)
    assert (masks.diff(dim=1) == 1).sum(dim=1).min() > 400
    assert all(starts <= torch.tensor([1, 1, 2, 4, 8, 16, 32, 64]))  # the bits of a Gray code
    gray = [0b000, 0b001, 0b011, 0b010, 0b110, 0b111, 0b101, 0b100]
    codes = torch.tensor([[code >> bit & 1 for code in sorted(gray)] for bit in (2, 1, 0)])
    assert neuron_order(codes).tolist() == gray
    assert neuron_order(torch.ones(300, 4)).tolist() == [0, 1, 2, 3]  # the sort is stable, also beyond 256 experts


@pytest.mark.parametrize(("hidden", "stride"), [(576, 576), (2048, 2064), (96, 96)])
@pytest.mark.parametrize("num_rows", [1, 3000])
def test_row_strides_avoid_multiples_of_512_bytes(num_rows, hidden, stride):
    rows = empty_rows(num_rows, hidden)
    assert (rows.shape, rows.stride(0), rows.dtype) == ((num_rows, hidden), stride, torch.float32)
    others = [empty_rows(5, 48).fill_(7) for _ in range(3)]
    assert torch.equal(rows.fill_(3), torch.full((num_rows, hidden), 3.0))
    assert all(torch.equal(other, torch.full((5, 48), 7.0)) for other in others)
    assert {tensor.data_ptr() % 64 for tensor in [rows, *others]} == {0}
    with torch.device("meta"):
        assert empty_rows(2, 64).is_meta
        assert empty_panels(2, 64).is_meta


def test_weights_are_on_huge_pages():
    modes = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not modes.exists() or "[never]" in modes.read_text():
        pytest.skip("huge pages are disabled here")
    empty_rows(1, 2048)  # freed, and its memory with it
    rows = empty_rows(4096, 2048).fill_(1)
    num_bytes = rows.shape[0] * rows.stride(0) * 4
    assert num_bytes <= bytes_in_huge_pages(rows) < num_bytes + HUGE_PAGE
    before = psutil.Process().memory_info().rss
    del rows
    assert before - psutil.Process().memory_info().rss >= num_bytes


def bytes_in_huge_pages(tensor) -> int:
    """Of the mappings that contain ``tensor``."""
    total, is_its = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            is_its = int(match[1], 16) <= tensor.data_ptr() < int(match[2], 16)
        elif is_its and line.startswith("AnonHugePages"):
            total += int(line.split()[1]) * 1024
    return total
