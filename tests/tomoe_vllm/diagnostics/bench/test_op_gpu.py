"""The op part of tomoe bench on a GPU: its logic on a CPU, with the kernels in Triton's interpreter, in float32."""

import json

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from tests.helpers.processes import environment, python
from tomoe_vllm.diagnostics.bench.measure import CpuClock
from tomoe_vllm.diagnostics.bench.op_gpu import GpuLayer, make_paths, masked_silu_and_mul, silu_and_mul, walk_layers

RUN = """
import json, torch
from tomoe_vllm.diagnostics.bench import op_gpu
from tomoe_vllm.diagnostics.bench.measure import CpuClock
from tomoe_vllm.diagnostics.bench.shapes import Shape

op_gpu.NUM_TOKENS, op_gpu.ROUNDS = (3, 9), 1
shape = Shape(
    hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16, vocab_size=96
)
chip = op_gpu.Chip(name="slow", bandwidth=1e9, flops=1e12)
options = {"clock": CpuClock(), "device": "cpu", "dtype": torch.float32, "is_compiled": False, "chip": chip}
print(json.dumps(op_gpu.bench_op_gpu(shape, **options)))
right = op_gpu.expert_mlp_cuda
op_gpu.expert_mlp_cuda = lambda x, ids, weights, path: right(x, ids, weights, path) * (1 + 1e-3 * (path == "gather"))
try:
    op_gpu.bench_op_gpu(shape, **options)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.process
def test_all_paths_must_agree_before_they_are_timed():
    result = python("-c", RUN, env=environment(TRITON_INTERPRET="1"))
    assert result.returncode == 0, result.stderr[-3000:]
    results, error = result.stdout.splitlines()
    first, second = json.loads(results)["rows"]
    shared = ["shared_gather", "shared_dense", "shared_grouped"]
    assert [*first["ms"]] == ["dense", "masked", *shared]
    assert [*second["ms"]] == ["dense", "masked", *shared[1:]], "gather is for a few tokens"
    assert first["route_ms"]["median"] > 0
    assert first["limit_ms"] == pytest.approx(3 * 4 * 32 * 48 * 0.875 / 1e9 * 1e3, rel=0.2)  # the union of few experts
    assert error.startswith("shared_gather differs from the masked path by 1.0e-03")


def test_one_call_runs_every_layer_with_another_draw():
    seen = []
    call = walk_layers(lambda layer, x, ids: seen.append((layer, x, ids)), ["a", "b", "c"], "x", [1, 2])
    call()
    assert seen == [("a", "x", 1), ("b", "x", 2), ("c", "x", 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_and_masked_paths_differ_by_the_mask_only(tiny_shape, dtype):
    layer = GpuLayer(tiny_shape, torch.Generator().manual_seed(0), dtype)
    x, ids = torch.randn(5, tiny_shape.hidden_size).to(dtype), torch.arange(5)
    paths = make_paths(16, is_compiled=False)
    assert "shared_gather" not in paths
    masked = paths["masked"](layer, x, ids)
    assert not torch.allclose(masked, paths["dense"](layer, x, ids))
    layer.masks.fill_(1.0)
    torch.testing.assert_close(paths["masked"](layer, x, ids), paths["dense"](layer, x, ids))
    assert paths["route"](layer, x, ids).shape == (5,)


@pytest.mark.process
def test_activations_compile_once_for_all_numbers_of_tokens():
    counter = CompileCounter()
    dense, masked = (torch.compile(f, backend=counter, dynamic=True) for f in (silu_and_mul, masked_silu_and_mul))
    for num_tokens in (3, 5, 16):
        dense(torch.randn(num_tokens, 8))
        masked(torch.randn(num_tokens, 8), torch.zeros(num_tokens, dtype=torch.int64), torch.ones(2, 4))
    assert counter.frame_count == 2


def test_cpu_clock_runs_the_call_itself():
    calls = []
    clock = CpuClock()
    assert clock.seconds(clock.prepare(lambda: calls.append(1))) >= 0
    assert calls == [1]
