"""Resident memory of a server: ToMoE against the dense model of the same weights (94 M parameters), in new processes.

``pytest -m slow -rP tests/parity/test_memory.py`` prints the measurements.
"""

import json

import pytest

from tests.helpers.processes import environment, python
from tomoe_vllm.diagnostics.bench.checkpoints import write_dense, write_tomoe
from tomoe_vllm.diagnostics.bench.shapes import Shape

pytestmark = [pytest.mark.engine, pytest.mark.slow]

SHAPE = Shape(
    hidden_size=1024, intermediate_size=2816, num_layers=8, num_heads=16, num_kv_heads=4, head_dim=64, vocab_size=4096
)

SERVE = """
import json, os, sys
from pathlib import Path
from vllm import LLM, SamplingParams

def status():
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {line[0][:-1]: int(line[1]) * 1024 for line in lines if line[0] in ("VmRSS:", "RssAnon:", "VmHWM:")}

before = status()
engine = LLM(
    sys.argv[1], dtype="float32", enforce_eager=True, skip_tokenizer_init=True, max_model_len=1025, max_num_seqs=2,
    num_gpu_blocks_override=64, hf_overrides=json.loads(sys.argv[2]),
)
memory = {"before": before, "loaded": status(), "served": []}
sampling = SamplingParams(temperature=0, max_tokens=1, detokenize=False)
for number in range(int(sys.argv[4])):
    prompt = [(number * 1024 + i) % 4093 for i in range(1024)]
    engine.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
    memory["served"].append(status())
with open(sys.argv[3], "w") as file:
    json.dump(memory, file)
os._exit(0)
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_dense(SHAPE, folder / "dense")
    write_tomoe(folder / "dense", folder / "tomoe")
    return folder


def serve(models, name: str, layout: str | None = None, num_prompts: int = 0) -> dict:
    """Memory in bytes: before the engine starts, after loading, and after each prompt of 1,024 tokens."""
    out = models / f"{name}-{layout}.json"
    variables = environment(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_CPU_KVCACHE_SPACE="1",
        OMP_NUM_THREADS="2",
    )
    overrides = json.dumps({"expert_layout": layout} if layout else {})
    result = python("-c", SERVE, models / name, overrides, out, num_prompts, env=variables, timeout=1800)
    assert out.exists(), result.stderr[-3000:]
    memory = json.loads(out.read_text())
    added = {key: (memory["loaded"][key] - memory["before"][key]) / 1e6 for key in memory["before"]}
    print(f"{name}, {layout}: loading added " + ", ".join(f"{key} {value:.0f} MB" for key, value in added.items()))
    print("after each prompt:", [round(status["RssAnon"] / 1e6) for status in memory["served"]], "MB of RssAnon")
    return memory


@pytest.fixture(scope="module")
def dense(models):
    return serve(models, "dense")


@pytest.fixture(scope="module")
def shared(models):
    return serve(models, "tomoe", "shared", num_prompts=16)


@pytest.mark.parametrize("layout", ["shared", "masked"])
def test_tomoe_needs_no_more_memory_than_dense(models, dense, layout, request):
    tomoe = request.getfixturevalue("shared") if layout == "shared" else serve(models, "tomoe", layout)
    # Compare only what loading added: 500 MB of libraries would hide half a copy of the weights.
    added, allowed = ({key: m["loaded"][key] - m["before"][key] for key in m["loaded"]} for m in (tomoe, dense))
    assert added["RssAnon"] <= 1.05 * allowed["RssAnon"]
    assert added["VmRSS"] <= 1.05 * allowed["VmRSS"]
    one_layer = SHAPE.mlp_bytes + 2 * 4 * SHAPE.hidden_size**2
    assert tomoe["loaded"]["VmHWM"] <= 1.05 * dense["loaded"]["VmHWM"] + one_layer


def test_memory_does_not_grow_with_the_number_of_prompts(shared):
    """With norms in plain torch the heap fragments. During the first prompts caches may still grow."""
    served = shared["served"]
    assert served[-1]["RssAnon"] <= 1.03 * served[7]["RssAnon"]


def test_fused_experts_are_built_without_a_second_copy(models, dense):
    """Peak memory is that of the experts (4 times the MLPs) and of the work on one layer."""
    fused = serve(models, "tomoe", "fused")
    more = (SHAPE.num_experts * SHAPE.expert_width / SHAPE.intermediate_size - 1) * SHAPE.mlp_bytes * SHAPE.num_layers
    assert fused["loaded"]["RssAnon"] > dense["loaded"]["RssAnon"] + 0.9 * more, (
        "the experts must show in the measurement"
    )
    one_layer = SHAPE.num_experts * SHAPE.expert_width / SHAPE.intermediate_size * SHAPE.mlp_bytes + SHAPE.mlp_bytes
    assert fused["loaded"]["VmHWM"] <= 1.05 * dense["loaded"]["VmHWM"] + more + one_layer
