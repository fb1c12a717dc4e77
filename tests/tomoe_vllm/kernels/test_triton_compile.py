"""Compiles the Triton kernels for A100, A10, L4, H100 and B200 (sm_80, 86, 89, 90, 100) without a GPU.

Checked with Triton 3.7.1, the version of GPU installs, for bf16 and the shapes of LLaMA-2 7B: no spilled registers,
shared memory within the limit of the chip, weights loaded by 16-byte asynchronous copies, the tensor-core instruction,
the pipeline depth.
"""

import re
from functools import cache

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is in the dev extra")

import triton.language as tl  # noqa: E402

from tests.helpers.triton_compile import Compiled, Launch, compile_launch, recorded_launches, specialization  # noqa: E402
from tomoe_vllm.kernels.expert_activation.triton import expert_activation_triton  # noqa: E402
from tomoe_vllm.kernels.expert_mlp.triton.gather import GatherConfig, expert_mlp_gather  # noqa: E402
from tomoe_vllm.kernels.expert_mlp.triton.grouped import expert_mlp_grouped, grouped_config  # noqa: E402
from tomoe_vllm.kernels.ops import ExpertTensors, ValueRouter  # noqa: E402
from tomoe_vllm.kernels.route.triton import MAX_TOKEN_PROGRAMS, TILE_K, route_triton  # noqa: E402
from tomoe_vllm.kernels.value_mask.triton import FEW_TOKENS, MANY, mask_values_triton  # noqa: E402

pytestmark = pytest.mark.process

SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Maximum shared memory per block (CUDA C++ programming guide, compute capabilities)."""

SHAPES = {
    "7b": {"hidden_size": 4096, "num_neurons": 11008, "width": 5504},
    "135m": {"hidden_size": 576, "num_neurons": 1536, "width": 768},  # D is not a multiple of the tiles
    "phi-2": {"hidden_size": 2560, "num_neurons": 10240, "width": 5120, "is_gated": False},
}
GROUPED_TOKENS = [64, 512, 4096]
"""One for each row of grouped_config: 8, 64 and 512 tokens per expert."""

GATHER = GatherConfig()


@pytest.fixture(scope="module", autouse=True)
def fresh_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.knobs.cache, "dir", str(tmp_path_factory.mktemp("triton")))
        yield
        compiled.cache_clear()


def meta(*shape: int, dtype=torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def record(path, shape, num_tokens, arch, dtype=torch.bfloat16) -> dict[str, Launch]:
    """Launches of a path by kernel name, at full size."""
    sizes = {"is_gated": True} | SHAPES[shape]
    hidden_size, num_neurons, is_gated = sizes["hidden_size"], sizes["num_neurons"], sizes["is_gated"]
    up_rows = num_neurons * (1 + is_gated)
    expert_ids = meta(num_tokens, dtype=torch.int64)
    weights = ExpertTensors(
        up=meta(up_rows, hidden_size, dtype=dtype),
        up_bias=None if is_gated else meta(up_rows, dtype=dtype),
        down=meta(num_neurons, hidden_size, dtype=dtype),
        masks=meta(8, num_neurons, dtype=torch.uint8),
        neuron_ids=meta(8, sizes["width"], dtype=torch.int32),
        widths=meta(8, dtype=torch.int32),
        activation="silu" if is_gated else "gelu_new",
    )
    arguments = meta(num_tokens, hidden_size, dtype=dtype), expert_ids, weights
    with recorded_launches(pytest.MonkeyPatch()) as launches:
        if path == "gather":
            expert_mlp_gather(*arguments)
        elif path == "grouped":
            config = grouped_config(num_tokens, 8, (arch // 10, arch % 10), dtype.itemsize)
            expert_mlp_grouped(*arguments, config)
        else:
            expert_activation_triton(meta(num_tokens, up_rows, dtype=dtype), expert_ids, weights.masks, "silu")
    return {launch.kernel.__name__: launch for launch in launches}


@cache
def compiled(path, shape, num_tokens, arch, dtype=torch.bfloat16) -> dict[str, Compiled]:
    launches = record(path, shape, num_tokens, arch, dtype)
    return {name: compile_launch(launch, arch) for name, launch in launches.items()}


def assert_fits(kernels: dict[str, Compiled], arch: int) -> None:
    for name, kernel in kernels.items():
        assert kernel.spilled_bytes == 0, name
        assert "serialized" not in kernel.ptxas, name  # ptxas serialized wgmma instructions
        assert kernel.shared_bytes <= SHARED_BYTES[arch], name


def expected_copies(config_threads: int, tile_bytes: int, depth: int) -> int:
    """16-byte copies of one thread for one tile: ``depth`` times before the loop and once inside it."""
    return tile_bytes // (16 * config_threads) * (depth + 1)


@pytest.mark.parametrize("arch", SHARED_BYTES)
@pytest.mark.parametrize("path", ["gather", "activation"])
def test_kernels_for_few_tokens_fit(path, arch):
    assert_fits(compiled(path, "7b", 1, arch), arch)


@pytest.mark.parametrize("arch", SHARED_BYTES)
@pytest.mark.parametrize("num_tokens", GROUPED_TOKENS)
def test_grouped_kernels_fit(num_tokens, arch):
    assert_fits(compiled("grouped", "7b", num_tokens, arch), arch)


@pytest.mark.parametrize("shape", ["135m", "phi-2"])
@pytest.mark.parametrize("path", ["gather", "grouped"])
def test_other_models_fit_and_copy_16_bytes(path, shape):
    kernels = compiled(path, shape, 1 if path == "gather" else 512, 80)
    assert_fits(kernels, 80)
    for name in (f"{path}_up_kernel", f"{path}_down_kernel"):
        assert kernels[name].async_copies[16] > 0, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_other_dtypes_fit(dtype):
    assert_fits(compiled("gather", "7b", 1, 80, dtype), 80)
    assert_fits(compiled("grouped", "7b", 512, 80, dtype), 80)


@pytest.mark.parametrize("arch", [80, 90])
def test_gather_pipelines_have_the_configured_depth(arch):
    kernels = compiled("gather", "7b", 1, arch)
    up, down = kernels["gather_up_kernel"], kernels["gather_down_kernel"]
    assert up.buffers(GATHER.up_block_n, GATHER.up_block_k) == {GATHER.up_stages - 1}
    assert down.buffers(GATHER.down_block_k, GATHER.down_block_n) == {GATHER.down_stages - 1}
    assert up.steps_ahead(GATHER.up_block_n, GATHER.up_block_k) == GATHER.up_stages - 1
    assert down.steps_ahead(GATHER.down_block_k, GATHER.down_block_n) == GATHER.down_stages - 1
    tile = GATHER.up_block_n * GATHER.up_block_k * 2
    assert up.async_copies[16] == 2 * expected_copies(32 * GATHER.up_warps, tile, GATHER.up_stages - 1)
    tile = GATHER.down_block_k * GATHER.down_block_n * 2
    assert down.async_copies[16] == expected_copies(32 * GATHER.down_warps, tile, GATHER.down_stages - 1)


def test_all_programs_of_gather_up_are_resident_on_an_a100():
    kernel, launch = compiled("gather", "7b", 1, 80)["gather_up_kernel"], record("gather", "7b", 1, 80)
    threads = 32 * GATHER.up_warps
    by_registers = 65536 // (-(-kernel.registers // 8) * 8 * threads)
    by_shared = 164 * 1024 // (kernel.shared_bytes + 1024)
    num_programs = launch["gather_up_kernel"].grid[1]
    assert num_programs <= 108 * min(by_registers, by_shared)


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("num_tokens", GROUPED_TOKENS)
def test_grouped_uses_tensor_cores_16_byte_copies_and_the_configured_depth(num_tokens, arch):
    config = grouped_config(num_tokens, 8, (arch // 10, arch % 10))
    kernels = compiled("grouped", "7b", num_tokens, arch)
    up, down = kernels["grouped_up_kernel"], kernels["grouped_down_kernel"]
    # wgmma needs 64 rows; it reads shared memory itself, and then the pipeline has one more buffer.
    is_wgmma = arch == 90 and config.block_m >= 64
    assert {up.tensor_core, down.tensor_core} == {"wgmma" if is_wgmma else "mma"}
    up_depth, down_depth = config.up_stages - 1 + is_wgmma, config.down_stages - 1 + is_wgmma
    assert up.buffers(config.up_block_n, config.up_block_k) == {up_depth}
    assert down.buffers(config.down_block_k, config.down_block_n) == {down_depth}
    assert up.steps_ahead(config.up_block_n, config.up_block_k) == config.up_stages - 1
    assert down.steps_ahead(config.down_block_k, config.down_block_n) == config.down_stages - 1
    up_bytes = 2 * (2 * config.up_block_n + config.block_m) * config.up_block_k
    down_bytes = 2 * (config.down_block_n + config.block_m) * config.down_block_k
    assert up.async_copies[16] == expected_copies(32 * config.up_warps, up_bytes, config.up_stages - 1)
    assert down.async_copies[16] == expected_copies(32 * config.down_warps, down_bytes, config.down_stages - 1)


def record_gates(
    num_tokens, dtype=torch.bfloat16, *, hidden_size=4096, num_experts=8, rank=128, head_dim=128, width=64
):
    """Launches of route and mask_values, by kernel name."""
    rank = 128
    hidden_states = meta(num_tokens, hidden_size, dtype=dtype)

    def weight(*shape):
        return meta(*shape, dtype=torch.float32)

    router = ValueRouter(weight(rank, hidden_size), weight(rank), weight(rank), weight(rank), weight(head_dim, rank))
    with recorded_launches(pytest.MonkeyPatch()) as launches:
        route_triton(hidden_states, weight(num_experts, hidden_size), meta(16384, dtype=torch.uint8))
        mask_values_triton(meta(num_tokens, 32 * head_dim, dtype=dtype), hidden_states, router, width)
    return {launch.kernel.__name__: launch for launch in launches}


@cache
def compiled_gates(num_tokens, arch, dtype=torch.bfloat16, **sizes) -> dict[str, Compiled]:
    return {name: compile_launch(launch, arch) for name, launch in record_gates(num_tokens, dtype, **sizes).items()}


@pytest.mark.parametrize("arch", SHARED_BYTES)
@pytest.mark.parametrize("num_tokens", [1, 8192])
def test_route_and_mask_values_fit_and_copy_16_bytes(num_tokens, arch):
    kernels = compiled_gates(num_tokens, arch)
    assert kernels.keys() >= {"value_down_kernel", "value_apply_kernel"}
    assert_fits(kernels, arch)
    for name, kernel in kernels.items():
        assert name == "value_apply_kernel" or kernel.async_copies[16] > 0, name
        assert name in ("value_apply_kernel", "route_token_kernel") or kernel.tensor_core == "mma", name


@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [
        pytest.param(torch.float16, {}, id="float16"),
        pytest.param(torch.float32, {"head_dim": 96}, id="float32, head_dim 96"),
        pytest.param(torch.bfloat16, {"hidden_size": 2560, "head_dim": 80, "num_experts": 16}, id="phi-2, 16 experts"),
        pytest.param(torch.bfloat16, {"head_dim": 256, "num_experts": 255}, id="head_dim 256, 255 experts"),
    ],
)
@pytest.mark.parametrize("num_tokens", [1, 8192])
def test_route_and_mask_values_of_other_models_fit(num_tokens, dtype, sizes):
    assert_fits(compiled_gates(num_tokens, 80, dtype, **sizes), 80)


@pytest.mark.parametrize("arch", [80, 90])
def test_products_are_summed_in_float32_outside_the_tensor_core(arch):
    """Each step starts from zero: a sum of all D in the tensor core would be truncated D / 16 times."""
    kernels = compiled_gates(8192, arch)
    for name, product in (("value_down_kernel", "32x64xf32"), ("route_tile_kernel", "16x16xf32")):
        loop = kernels[name].ttgir.split("scf.for", 1)[1].split("scf.yield", 1)[0]
        dots = [line for line in loop.splitlines() if "tt.dot" in line]
        assert len(dots) == 3, "high, middle and low parts of the weight"
        assert re.search(r"tt\.dot %[\w]+, %[\w]+, %cst", dots[0]), "from zero"
        assert re.search(rf"arith\.addf %arg\d+, .*{product}", loop), "added to the accumulator"


@pytest.mark.parametrize("arch", [80, 90])
def test_pipelines_of_the_tile_kernels_have_their_depth(arch):
    kernels = compiled_gates(8192, arch)
    assert kernels["value_down_kernel"].steps_ahead(MANY.block_t, MANY.block_k) == MANY.stages - 1
    assert kernels["route_tile_kernel"].steps_ahead(16, TILE_K) == 3


@pytest.mark.parametrize("counts", [(1, 2, 16, FEW_TOKENS), (FEW_TOKENS + 1, 128, 256), (MAX_TOKEN_PROGRAMS + 1, 8192)])
def test_one_binary_of_the_gates_serves_every_number_of_tokens_and_width(counts):
    cases = [(n, w) for n in counts for w in (1, 63, 64)]
    first, *others = ({n: specialization(k) for n, k in record_gates(m, width=w).items()} for m, w in cases)
    assert all(other == first for other in others)


def test_launching_the_gates_reads_nothing_from_the_device():
    assert len(record_gates(1)) == 3  # on meta tensors a host sync would raise


@triton.jit
def indexed_loop_kernel(
    hidden_ptr,
    down_weight_ptr,
    neuron_ids_ptr,
    output_ptr,
    width,
    hidden_size,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    VARIANT: tl.constexpr,
):
    """The loop of grouped_down, with three variants of loading the row indices."""
    tokens, columns, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    rows = tl.load(neuron_ids_ptr + columns)
    if VARIANT == "carried cast":
        rows = rows.to(tl.int64)
    for k in tl.range(0, width, BLOCK_K, num_stages=STAGES):
        if VARIANT == "same step":
            rows = tl.load(neuron_ids_ptr + k + columns)
        values = tl.load(hidden_ptr + tokens[:, None] * width + k + columns[None, :])
        weight = tl.load(down_weight_ptr + rows.to(tl.int64)[:, None] * hidden_size + dims[None, :])
        acc = tl.dot(values, weight, acc)
        if VARIANT != "same step":
            rows = tl.load(neuron_ids_ptr + k + BLOCK_K + columns)
        if VARIANT == "carried cast":
            rows = rows.to(tl.int64)
    tl.store(output_ptr + tokens[:, None] * hidden_size + dims[None, :], acc.to(tl.bfloat16))


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        pytest.param("carried", 3, id="loaded one step ahead, carried as loaded: full depth"),
        pytest.param("same step", 1, id="loaded in the step that uses them"),
        pytest.param("carried cast", 0, id="carried after a cast: buffers are allocated, nothing overlaps"),
    ],
)
def test_loading_of_row_indices_decides_the_pipeline_depth(variant, expected, arch):
    arguments = (meta(64, 5504), meta(11008, 4096), meta(5504, dtype=torch.int32), meta(64, 4096), 5504, 4096)
    tiles = {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "STAGES": 4, "VARIANT": variant}
    options = {"num_warps": 4, "enable_fp_fusion": True}
    kernel = compile_launch(Launch(indexed_loop_kernel, (1,), arguments, tiles, options), arch)
    assert kernel.steps_ahead(64, 128) == expected


@pytest.mark.parametrize("path", ["gather", "activation", "grouped"])
def test_launching_reads_nothing_from_the_device(path):
    """A host sync or a data-dependent shape would raise on meta tensors."""
    launches = record(path, "7b", 300, 80)
    assert launches
    with pytest.raises(RuntimeError, match="meta"):
        next(iter(launches.values())).arguments[1].flatten()[0].item()


@pytest.mark.parametrize(("path", "counts"), [("gather", (1, 2, 3)), ("grouped", (513, 1024, 4097))])
def test_one_binary_serves_every_number_of_tokens(path, counts):
    """Otherwise a server would compile while it serves requests or captures a graph."""
    first, *others = ({n: specialization(k) for n, k in record(path, "7b", m, 80).items()} for m in counts)
    assert all(other == first for other in others)


def test_spills_are_detected():
    """Two accumulators of 128 x 128 exceed the registers of 8 warps on an A100, so its tile is 128 x 64."""
    launch = record("grouped", "7b", 4096, 90)["grouped_up_kernel"]
    assert launch.constexprs["BLOCK_N"] == 128
    assert compile_launch(launch, 80).spilled_bytes > 0
