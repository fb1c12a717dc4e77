"""How many GPU launches does one decoder layer make, dense and ToMoE? Run: python benchmarks/launches.py

The layer is traced as vLLM traces it, split at the attention op as vLLM splits it, and compiled by inductor into the
program that would run on a GPU; that program's launches are counted. No GPU is needed and no kernel is compiled or run:
tensors are fake, and the properties of an H100 are made up. An op of this project counts as what its CUDA
implementation launches.

What it does not show: vLLM compiles the graph for a symbolic number of tokens, this for 16; and vLLM lets inductor time
whether to combine independent kernels into one (``combo_kernels``, vLLM's default), which is taken as combined here
(``--separate`` counts them one by one). The launches of attention and of the KV cache are inside vLLM's two ops, the
same on both sides, and count as one each. cuBLAS may split a GEMM into two launches, on both sides.

The last line is JSON. vLLM has no Phi of its own (it runs it through Transformers): dense Phi is made of its layers.
Needs g++ (or CXX)."""

import argparse
import ctypes
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
import torch._dynamo.device_interface as device_interface
import torch._inductor.config as inductor_config
import torch._inductor.scheduler as inductor_scheduler
import torch.utils._triton as triton_utils
import vllm.ir
from torch import Tensor, nn
from torch._inductor.compile_fx import compile_fx
from torch._inductor.fx_passes import joint_graph, post_grad
from torch._inductor.graph import GraphLowering
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, PhiConfig
from triton.runtime.jit import JITFunction
from vllm.compilation.backends import split_graph
from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.custom_op import CustomOp
from vllm.model_executor.layers.activation import get_act_fn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.linear import UnquantizedLinearMethod as LinearMethod
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.llama import LlamaModel
from vllm.platforms import current_platform

from tomoe_vllm.hf.configuration_tomoe import CONFIG_CLASSES
from tomoe_vllm.kernels import build, route, value_mask
from tomoe_vllm.kernels.ops import ValueRouter
from tomoe_vllm.models.tomoe import ToMoEModel

NUM_TOKENS = 16
SPLITTING_OPS = ["vllm::unified_attention_with_output", "vllm::unified_kv_cache_update"]
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 4096, "intermediate_size": 11008, "head_dim": 128, "hidden_act": "silu"},
    "phi": {"hidden_size": 2560, "intermediate_size": 10240, "partial_rotary_factor": 0.4, "hidden_act": "gelu_new"},
}
"""LLaMA-2 7B and Phi-2."""
COMMON = {"num_hidden_layers": 2, "num_attention_heads": 32, "vocab_size": 256, "max_position_embeddings": 2048}
# Registers a device guard for CUDA that does nothing: without one, torch's CPU build refuses to index a fake tensor.
DEVICE_GUARD = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
static c10::impl::DeviceGuardImplRegistrar registrar(
    c10::DeviceType::CUDA, new c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>());
"""


# -------------------------------------------------------------------------------------------- a GPU that is not there
def load_device_guard() -> None:
    torch_folder = Path(torch.__file__).parent
    compiler = build.compiler()
    if compiler is None:
        raise SystemExit("launches.py needs a C++ compiler (install g++, or set CXX)")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "guard.cpp", Path(folder) / "guard.so"
        source.write_text(DEVICE_GUARD)
        options = ["-std=c++20", "-fPIC", "-shared", f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}"]
        subprocess.run([compiler, *options, str(source), "-lc10", "-o", str(library)], check=True)
        ctypes.CDLL(str(library))


class GeneratedError(Exception):
    """Carries the generated program out of inductor, which would compile its kernels next."""


def pretend_gpu(is_combined: bool) -> None:
    """Let vLLM's layers and inductor take this process for one with an H100."""
    load_device_guard()
    memory = {"regs_per_multiprocessor": 65536, "shared_memory_per_block_optin": 232448, "total_memory": 80 * 2**30}
    threads = {"multi_processor_count": 132, "warp_size": 32, "max_threads_per_multi_processor": 2048}
    properties = SimpleNamespace(name="H100", gcnArchName="", major=9, minor=0, **memory, **threads)
    interface = device_interface.CudaInterface
    interface.Worker.get_device_properties = staticmethod(lambda device=None: properties)
    interface.get_device_properties = staticmethod(lambda device=None: properties)
    interface.get_compute_capability = staticmethod(lambda device=None: 90)
    interface.is_bf16_supported = staticmethod(lambda including_emulation=False: True)
    torch.cuda.get_device_properties = lambda device=None: properties
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.current_device = lambda: 0
    inductor_scheduler.has_triton = lambda *arguments: True
    triton_utils.triton_hash_with_backend = lambda *arguments: ""
    cpu = torch.device("cpu")
    for module in (joint_graph, post_grad):  # trace the patterns on the CPU; they are the same
        module.lazy_init(cpu)
        module.lazy_init = lambda *arguments: None
    deduce = joint_graph.UniformValueConstantFolder._deduce_value

    def deduce_on_cpu(self, node):
        """It makes real tensors of one element."""
        options = node.kwargs
        if "device" in options:
            node.kwargs = {**options, "device": cpu}
        try:
            return deduce(self, node)
        finally:
            node.kwargs = options

    joint_graph.UniformValueConstantFolder._deduce_value = deduce_on_cpu

    def stop(graph: GraphLowering) -> None:
        raise GeneratedError(graph.codegen()[0].value)

    GraphLowering.compile_to_module = stop
    inductor_config.force_disable_caches = True
    # What vLLM sets on CUDA (CompilationConfig.__post_init__), but for the benchmark.
    inductor_config.combo_kernels = is_combined
    inductor_config.benchmark_combo_kernel = False
    inductor_config.enable_auto_functionalized_v2 = False
    type(current_platform).is_cuda = lambda self: True
    type(current_platform).is_cpu = lambda self: False
    vllm.ir.set_default_torch_wrap(False)  # vLLM lowers its norms to plain torch before inductor


# ------------------------------------------------------------------------------------------------------------- models
class DensePhiLayer(nn.Module):
    """Attention and MLP of one input, summed; as in ``transformers.models.phi``."""

    def __init__(self, config: PhiConfig, prefix: str) -> None:
        super().__init__()
        size, heads = config.hidden_size, config.num_attention_heads
        head_dim = size // heads
        self.qkv_proj = QKVParallelLinear(size, head_dim, heads, heads, bias=True)
        self.dense = RowParallelLinear(size, size, bias=True)
        self.rotary_emb = get_rope(head_dim, config.max_position_embeddings, rope_parameters=config.rope_parameters)
        self.attn = Attention(heads, head_dim, head_dim**-0.5, num_kv_heads=heads, prefix=f"{prefix}.attn")
        self.fc1 = ColumnParallelLinear(size, config.intermediate_size, bias=True)
        self.act = get_act_fn(config.hidden_act)
        self.fc2 = RowParallelLinear(config.intermediate_size, size, bias=True)
        self.input_layernorm = nn.LayerNorm(size)

    def forward(self, positions: Tensor, residual: Tensor) -> Tensor:
        hidden = self.input_layernorm(residual)
        q, k, v = self.qkv_proj(hidden)[0].chunk(3, dim=-1)
        q, k = self.rotary_emb(positions, q, k)
        attention = self.dense(self.attn(q, k, v))[0]
        return attention + self.fc2(self.act(self.fc1(hidden)[0]))[0] + residual


class DensePhi(nn.Module):
    def __init__(self, config: PhiConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DensePhiLayer(config, f"layers.{i}") for i in range(config.num_hidden_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size)

    def forward(self, input_ids: Tensor, positions: Tensor, *others: None) -> Tensor:
        hidden = self.embed_tokens(input_ids)
        for layer in self.layers:
            hidden = layer(positions, hidden)
        return self.final_layernorm(hidden)


class ModelConfig(SimpleNamespace):
    """The fields of vLLM's that its layers read; all others are None."""

    def __getattr__(self, name: str) -> None:
        return None


def vllm_config(config: Any, has_record: bool) -> VllmConfig:
    made = VllmConfig(
        compilation_config=CompilationConfig(custom_ops=["none"]),
        additional_config={"tomoe_expert_statistics": has_record},
    )
    object.__setattr__(made, "model_config", ModelConfig(hf_config=config, dtype=torch.bfloat16))
    return made


def tomoe_config(family: str, *, keeps_query_key: bool) -> Any:
    """Half of the neurons and of the value dims; half of the Q/K dims too unless they are kept."""
    shape = SHAPES[family]
    head_dim = shape.get("head_dim", shape["hidden_size"] // COMMON["num_attention_heads"])
    num_layers = COMMON["num_hidden_layers"]
    return CONFIG_CLASSES[family](
        num_experts=8,
        expert_intermediate_sizes=[shape["intermediate_size"] // 2] * num_layers,
        qk_head_dims=[head_dim if keeps_query_key else head_dim // 2] * num_layers,
        vo_head_dims=[head_dim // 2] * num_layers,
        value_router_dim=128,
        expert_layout="masked",
        **COMMON,
        **shape,
    )


def make_model(family: str, kind: str) -> tuple[nn.Module, VllmConfig]:
    """Two layers of ``kind`` "dense", "Q/K kept" or "Q/K pruned", as after loading."""
    if kind == "dense":
        config = {"llama": LlamaConfig, "phi": PhiConfig}[family](**COMMON, **SHAPES[family])
    else:
        config = tomoe_config(family, keeps_query_key=kind == "Q/K kept")
    made = vllm_config(config, has_record=True)
    with set_current_vllm_config(made):
        if kind != "dense":
            model = ToMoEModel(vllm_config=made)
        else:
            model = LlamaModel(vllm_config=made) if family == "llama" else DensePhi(config)
        for module in model.modules():
            method = getattr(module, "quant_method", None)
            if isinstance(method, LinearMethod):
                method.process_weights_after_loading(module)
                if getattr(method, "bias", None) is not None:  # the pruned bias: a tensor that no module holds
                    module.bias, method.apply = nn.Parameter(method.bias), LinearMethod.apply.__get__(method)
            if isinstance(module, CustomOp):
                module._forward_method = module.forward_native
            if isinstance(module, Attention):  # as FLASH_ATTN; the backend chosen here is the CPU's
                module.attn_backend = type(
                    "Backend", (module.attn_backend,), {"forward_includes_kv_cache_update": False}
                )
    model.do_not_compile = True
    return model, made


# ----------------------------------------------------------------------------------------------------------- programs
def layer_programs(model: nn.Module, config: VllmConfig) -> tuple[str, list[str]]:
    """Program of what lies between the attention ops of two layers (one whole layer), and names of those ops."""
    tensors = dict([*model.named_parameters(), *model.named_buffers()])

    def run(input_ids: Tensor, positions: Tensor, *values: Tensor) -> Tensor:
        state = dict(zip(tensors, values, strict=True))
        return torch.func.functional_call(model, state, (input_ids, positions, None, None), tie_weights=False)

    def fake(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(size, stride, dtype=dtype, device="cuda")

    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), set_current_vllm_config(config):
        inputs = [fake((NUM_TOKENS,), (1,), torch.int64) for _ in range(2)]
        inputs += [fake(tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors.values()]
        graph = make_fx(run)(*inputs)
        graph.graph.eliminate_dead_code()
        graph.recompile()
        split, parts = split_graph(graph, SPLITTING_OPS)
        is_splitting = {part.submod_name: part.is_splitting_graph for part in parts}
        first, _, middle, _, last = is_splitting  # two layers
        assert [is_splitting[name] for name in (first, middle, last)] == [False] * 3
        program = ""

        class Compile(torch.fx.Interpreter):
            def call_module(self, target, arguments, keywords):
                nonlocal program
                if target == middle:
                    try:
                        compile_fx(split.get_submodule(target), list(arguments))
                    except Exception as error:  # inductor wraps what GraphLowering raises
                        if "GeneratedError" not in f"{type(error).__name__}: {error}":
                            raise
                        program = str(error)
                return super().call_module(target, arguments, keywords)

        Compile(split).run(*inputs)
        nodes = split.get_submodule(list(is_splitting)[1]).graph.nodes
    return program, [str(node.target).removesuffix(".default") for node in nodes if node.op == "call_function"]


class DeviceOps(TorchDispatchMode):
    """Counts ops that are not allocations or views: each would be a launch."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if not function.is_view and "empty" not in function.__name__:
            self.names.append(function.__name__)
        return function(*arguments, **(keywords or {}))


def launches_of(call: Callable[[], object]) -> list[str]:
    """Names of the Triton kernels and torch ops that ``call`` launches, on meta tensors."""
    names = []
    get_item = JITFunction.__getitem__

    def record(kernel: JITFunction, grid: Any) -> Callable[..., None]:
        return lambda *arguments, **options: names.append(kernel.__name__)

    JITFunction.__getitem__ = record
    try:
        with DeviceOps() as ops:
            call()
    finally:
        JITFunction.__getitem__ = get_item
    return names + ops.names


def op_launches(family: str) -> dict[str, list[str]]:
    """Launches of each op of this project in its CUDA implementation, by name."""
    config = tomoe_config(family, keeps_query_key=True)
    size, rank = config.hidden_size, config.value_router_dim
    head_dim = SHAPES[family].get("head_dim", size // config.num_attention_heads)

    def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    hidden = meta(NUM_TOKENS, size, dtype=torch.bfloat16)
    attention = meta(NUM_TOKENS, config.num_attention_heads * head_dim, dtype=torch.bfloat16)
    router, record = meta(config.num_experts, size), meta(NUM_TOKENS, dtype=torch.uint8)
    values = ValueRouter(meta(rank, size), meta(rank), meta(rank), meta(rank), meta(head_dim, rank))
    return {
        "tomoe.route": launches_of(lambda: route._route_cuda(hidden, router)),
        "tomoe.route_recorded": launches_of(lambda: route._route_cuda(hidden, router, record)),
        "tomoe.mask_values": launches_of(lambda: value_mask._cuda(attention, hidden, *values, head_dim // 2)),
    }


def launches(program: str, ops: dict[str, list[str]]) -> list[str]:
    """What a generated program launches, in order. Raises ``ValueError`` for an op that is not known here."""
    names = []
    for line in program[program.index("def call(") :].splitlines():
        code = line.split("#")[0]
        if "assert_" in code:
            continue
        if found := re.search(r"\b(triton_\w+?)(?:_\d+)?\.run\(|\bextern_kernels\.(\w+)\(", code):
            names.append(found[1] or found[2])
        elif found := re.search(r"\btorch\.ops\.(\w+\.\w+)", code):
            if found[1] not in ops:
                raise ValueError(f"the program calls {found[1]}, whose launches are not known: {code.strip()}")
            names += [f"{found[1]}: {name}" for name in ops[found[1]]]
        elif ".copy_(" in code:
            names.append("copy")
    return names


def float32_copies(program: str, hidden_size: int) -> int:
    """Buffers of float32 hidden states, [T, D], that the program allocates."""
    return len(re.findall(rf"\(\({NUM_TOKENS}, {hidden_size}\), \(\d+, \d+\), torch\.float32\)", program))


def count(family: str, kind: str) -> dict:
    program, attention = layer_programs(*make_model(family, kind))
    names, size = launches(program, op_launches(family)) + attention, SHAPES[family]["hidden_size"]
    counts = {"launches": len(names), "float32_copies": float32_copies(program, size)}
    return {"family": family, "kind": kind, "names": names, **counts}


def start(is_combined: bool) -> None:
    """Prepare this process. It stays changed, so it should do nothing else afterwards."""
    torch.set_default_dtype(torch.bfloat16)
    with set_current_vllm_config(VllmConfig()), tempfile.TemporaryDirectory() as folder:
        init_distributed_environment(1, 0, f"file://{folder}/init", 0, "gloo")
        initialize_model_parallel(1, 1)
    pretend_gpu(is_combined)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--separate", action="store_true", help="do not combine independent kernels")
    arguments = parser.parse_args()
    start(is_combined=not arguments.separate)
    results = []
    for family in SHAPES:
        dense = count(family, "dense")
        print(f"{family}, dense: {dense['launches']} launches of a layer")
        for name in dense["names"]:
            print(f"    {name}")
        results.append(dense | {"more_than_dense": 0})
        for kind in ("Q/K kept", "Q/K pruned"):
            tomoe = count(family, kind)
            more = tomoe["launches"] - dense["launches"]
            print(f"{family}, ToMoE masked, {kind}: {tomoe['launches']}, {more:+d}")
            for sign, names in (("+", Counter(tomoe["names"])), ("-", Counter(dense["names"]))):
                other = Counter((dense if sign == "+" else tomoe)["names"])
                for name, number in (names - other).items():
                    print(f"  {sign} {number} {name}")
            results.append(tomoe | {"more_than_dense": more})
    print(json.dumps({"tokens": NUM_TOKENS, "combined": not arguments.separate, "layers": results}))


if __name__ == "__main__":
    main()
