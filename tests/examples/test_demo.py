"""The demo: how it serves on each device, and what its table says there."""

import io

import pytest

from examples import demo

ROW = {"batch": 1, "path": "shared_rows", "ratio": 1.4}


def speeds(**tokens_per_s: float) -> dict:
    return {name: {"median": value} for name, value in tokens_per_s.items()}


def result(device: str, dtype: str, baseline: str, **tokens_per_s: float) -> dict:
    return {
        "dense_ppl": 10.0, "tomoe_ppl": 11.0, "active_ratio": 0.7, "train_steps": 20, "train_seconds": 60.0,
        "resumed_from_shipped_adapter": True, "parity_max_logprob_diff": 1e-5, "answer": "Paris", "device": device,
        "dtype": dtype, "baseline": baseline, "decode": [ROW | {"tokens_per_s": speeds(**tokens_per_s)}],
    }  # fmt: skip


@pytest.fixture
def table(monkeypatch):
    """What print_table prints for a result."""

    def printed(facts: dict) -> str:
        console = demo.Console(record=True, width=140, file=io.StringIO())
        monkeypatch.setattr(demo, "console", console)
        demo.print_table(facts)
        return console.export_text()

    return printed


def test_a_server_on_a_gpu_is_compiled_and_leaves_memory_for_another():
    options = demo.SERVE_OPTIONS["cuda"]
    assert "--enforce-eager" not in options
    assert options[options.index("--dtype") + 1] == "bfloat16", "FlashAttention does not take float32"
    assert float(options[options.index("--gpu-memory-utilization") + 1]) <= 0.42
    assert demo.SERVE_ENVIRONMENT["cuda"] == {}
    assert demo.SERVE_OPTIONS["cpu"] == ["--dtype", "float32", "--enforce-eager"]


def test_the_table_says_what_was_compared_on_each_device(table):
    cpu = table(result("cpu", "float32", "dense with the same norm", dense_as_shipped=20.0, dense=25.0, tomoe=35.0))
    assert [cell.strip() for cell in cpu.splitlines() if "batch 1" in cell for cell in cell.split("│")][1:-1] == [
        "decode, tokens/s, batch 1", "25.0", "35.0", "1.40", "20.0",
    ]  # fmt: skip
    assert "vLLM's own norm is plain torch on CPUs" in cpu
    gpu = table(result("cuda", "bfloat16", "dense as shipped", dense=250.0, tomoe=350.0))
    assert "own norm" not in gpu
    assert "CPU" not in gpu
    assert "x: ToMoE relative to dense as shipped, in bfloat16" in gpu
    assert "execution path of ToMoE's MLP: shared_rows" in gpu
