"""How tomoe bench runs its engines: by device, by what fits on a GPU, and with a KV cache of equal size."""

import subprocess
from dataclasses import fields
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig

from tomoe_vllm.diagnostics.bench import setup
from tomoe_vllm.diagnostics.bench.checkpoints import write_dense, write_tomoe
from tomoe_vllm.diagnostics.bench.setup import GpuMemory, choose_device, cpu_setup, cuda_setup, engine_setup

GIB = 1 << 30
LLAMA_2_7B = LlamaConfig(max_position_embeddings=4096)
H100 = GpuMemory(name="NVIDIA H100", total=80 * GIB, free=79 * GIB)
A10 = GpuMemory(name="NVIDIA A10", total=24 * GIB, free=23 * GIB)
WEIGHTS = {"dense": int(12.6 * GIB), "tomoe": int(12.7 * GIB)}


def of_7b(memory=H100, order="auto", **sizes):
    return cuda_setup(memory, WEIGHTS | sizes, LLAMA_2_7B, order)


def test_engines_on_a_gpu_run_as_users_serve_them():
    arguments = of_7b().arguments
    assert arguments["dtype"] == "bfloat16", "FlashAttention does not take float32"
    assert arguments["enforce_eager"] is False, "compiled, with CUDA graphs"
    assert "async_scheduling" not in arguments
    assert "compilation_config" not in arguments
    assert not {name for name in of_7b().environment if name.startswith(("VLLM_CPU", "MALLOC"))}


def test_arguments_are_those_of_the_installed_vllm():
    from vllm import EngineArgs

    names = {field.name for field in fields(EngineArgs)}
    assert of_7b().arguments.keys() | cpu_setup().arguments.keys() <= names


def test_two_engines_on_a_gpu_get_042_of_its_memory_each_and_the_same_kv_cache():
    both = of_7b()
    assert both.is_interleaved
    assert both.arguments["gpu_memory_utilization"] == 0.42
    # 32 layers, 32 heads of 128 keys and 128 values in bfloat16
    assert both.arguments["kv_cache_memory_bytes"] == both.kv_cache_bytes == 32 * 2 * 32 * 128 * 2 * setup.KV_TOKENS
    blocks = -(-(both.decode_prompt + both.decode_steps + 1) // 128)
    assert max(both.batches) * blocks * 128 <= setup.KV_TOKENS
    assert both.arguments["max_model_len"] <= setup.KV_TOKENS


@pytest.mark.parametrize(
    ("memory", "sizes", "order", "is_interleaved", "share"),
    [
        pytest.param(H100, {}, "sequential", False, 0.9, id="told to run one after the other"),
        pytest.param(A10, {}, "auto", False, 0.88, id="7B fits once on 24 GB"),
        pytest.param(H100, {"tomoe": 50 * GIB}, "auto", False, 0.9, id="ToMoE's fused layout alone is too large"),
        pytest.param(
            GpuMemory(name="NVIDIA H100", total=80 * GIB, free=60 * GIB),
            {},
            "auto",
            True,
            0.34,
            id="others use the GPU",
        ),
    ],
)
def test_engines_share_a_gpu_only_if_both_fit(memory, sizes, order, is_interleaved, share):
    result = of_7b(memory, order, **sizes)
    assert (result.is_interleaved, result.arguments["gpu_memory_utilization"]) == (is_interleaved, share)
    assert share * (2 if is_interleaved else 1) * memory.total < memory.free


@pytest.mark.parametrize(
    ("memory", "order", "words"),
    [
        (A10, "interleaved", "two engines at once; use --order sequential"),
        (GpuMemory(name="NVIDIA T4", total=16 * GIB, free=15 * GIB), "auto", "not enough for one engine"),
    ],
)
def test_a_model_that_does_not_fit_is_one_line_with_its_size(memory, order, words):
    with pytest.raises(ValueError, match=r"GiB free, and an engine needs about 20.2 GiB") as error:
        of_7b(memory, order)
    assert words in str(error.value)


def test_prompts_fit_the_model():
    short = cuda_setup(H100, WEIGHTS, LlamaConfig(max_position_embeddings=2048), "auto")
    assert (short.prompts, short.arguments["max_model_len"]) == ((256, 1024), 1025)
    long = cuda_setup(H100, WEIGHTS, LlamaConfig(max_position_embeddings=8192), "auto")
    assert (long.prompts, long.arguments["max_model_len"]) == ((256, 1024, 4096), 4097)


def test_engines_on_a_cpu_run_in_float32_at_once_or_one_after_the_other():
    assert cpu_setup().arguments["dtype"] == "float32"
    assert [cpu_setup(order).is_interleaved for order in setup.ORDERS] == [True, True, False]


def test_memory_and_weights_decide_on_a_gpu(tiny_shape, tmp_path, monkeypatch):
    write_dense(tiny_shape, tmp_path / "dense")
    write_tomoe(tmp_path / "dense", tmp_path / "tomoe")
    folders = {name: tmp_path / name for name in ("dense", "tomoe")}
    sizes = {name: setup.weight_bytes(folder) for name, folder in folders.items()}
    parameters = 96 * 128 + 2 * (3 * 128 * 96 + 2 * 128 * 128 + 2 * 64 * 128)
    assert 2 * parameters < sizes["dense"] < sizes["tomoe"] < 2.5 * sizes["dense"], "linked files count too"
    monkeypatch.setattr(setup, "gpu_memory", lambda: H100)
    assert engine_setup("cuda", folders, "auto").is_interleaved
    monkeypatch.setattr(setup, "gpu_memory", lambda: GpuMemory(name="tiny", total=5 * GIB, free=5 * GIB))
    assert not engine_setup("cuda", folders, "auto").is_interleaved


def platform(monkeypatch, kind):
    from vllm import platforms

    fake = SimpleNamespace(is_cuda=lambda: kind == "cuda", device_name=kind)
    monkeypatch.setattr(platforms, "current_platform", fake)


def test_the_device_is_the_one_that_vllm_runs_on(monkeypatch):
    for kind in ("cpu", "cuda"):
        platform(monkeypatch, kind)
        assert choose_device(None) == choose_device(kind) == kind
    with pytest.raises(ValueError, match=r"needs vLLM's CPU build.*EXTRA=cpu"):
        choose_device("cpu")
    platform(monkeypatch, "cpu")
    with pytest.raises(ValueError, match="vLLM runs on cpu here; it needs vLLM's CUDA build"):
        choose_device("cuda")
    with pytest.raises(ValueError, match="must be one of cpu, cuda"):
        choose_device("tpu")


def test_memory_of_the_gpu_is_asked_in_another_process(monkeypatch):
    answer = subprocess.CompletedProcess([], 0, 'a warning\n{"name": "NVIDIA H100", "total": 80, "free": 79}\n', "")
    monkeypatch.setattr(setup.subprocess, "run", lambda *_, **__: answer)
    assert setup.gpu_memory() == GpuMemory(name="NVIDIA H100", total=80, free=79)
    failed = subprocess.CompletedProcess([], 1, "", "Traceback\nRuntimeError: no NVIDIA driver\n")
    monkeypatch.setattr(setup.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(RuntimeError, match="CUDA failed: RuntimeError: no NVIDIA driver"):
        setup.gpu_memory()
