"""Rates of the device, on a GPU whose times are given."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from tests.tomoe_vllm.diagnostics.full.test_page import facts, result
from tomoe_vllm.diagnostics.device import CudaDevice
from tomoe_vllm.diagnostics.full import kernel_jobs
from tomoe_vllm.diagnostics.full.page import render
from tomoe_vllm.diagnostics.full.plan import Options, make_plan
from tomoe_vllm.diagnostics.roofline import Chip


class GivenGPU(CudaDevice):
    type = "cpu"

    def __init__(self):
        pass

    def milliseconds_per_call(self, run, calls=40):
        run()
        return 0.002

    def measured_chip(self):
        return Chip(name="NVIDIA H200", bandwidth=4e12, flops=7e14)


@pytest.fixture
def gpu(monkeypatch):
    properties = SimpleNamespace(
        name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=139 << 30, L2_cache_size=50 << 20
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(kernel_jobs, "nothing_kernel", defaultdict(lambda: lambda pointer: None))
    device = GivenGPU()
    monkeypatch.setattr(kernel_jobs, "device", lambda: device)
    monkeypatch.setattr(kernel_jobs, "chip", device.measured_chip)


def test_rates_are_measured_and_shown(gpu):
    (found,) = kernel_jobs.run(make_plan(Options())[0], Options())
    assert found.values["empty_kernel_us"] == pytest.approx(2.0)
    assert found.values["capability"] == "9.0"
    page = render(facts([result("kernels", found.name, found.values)]))
    assert "4.00 TB/s" in page
    assert "139.0 GiB, 50 MiB" in page


def test_only_the_latest_layer_is_kept(gpu):
    tiny, share, *_ = Options(interpret=True).layers().values()
    first = kernel_jobs.layer_of(tiny, "float32")
    assert kernel_jobs.layer_of(tiny, "float32") is first
    kernel_jobs.layer_of(share, "float32")
    assert len(kernel_jobs._layers) == 1
