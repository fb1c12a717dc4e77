"""GPU launches of one layer in the compiled graph: the masked layout makes at most 4 more than the dense model.

The count runs in a process of its own, which takes itself for one with a GPU.
"""

import json
import shutil
from pathlib import Path

import pytest

from tests.helpers.processes import python

pytest.importorskip("triton", reason="Triton is in the dev extra")

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
ALLOWED_MORE = 4
CODE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import launches
from tomoe_vllm.kernels import route
from tomoe_vllm.layers.mlp import router

launches.start(is_combined=True)
layers = [launches.count(family, kind) for family in launches.SHAPES for kind in ("dense", "Q/K kept", "Q/K pruned")]

whole = router.route
router.route = lambda hidden_states, *others: whole(hidden_states.float(), *others)
layers.append(launches.count("llama", "Q/K kept") | {"fault": "float32 copy"})
router.route = whole

once = route._route_cuda
route._route_cuda = lambda *arguments: (once(*arguments), once(*arguments))
layers.append(launches.count("llama", "Q/K pruned") | {"fault": "two launches of route"})

route._route_cuda = route.route_reference
layers.append(launches.count("llama", "Q/K kept") | {"fault": "plain torch"})
print(json.dumps(layers))
"""

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(not shutil.which("g++"), reason="needs g++"),
]


@pytest.fixture(scope="module")
def layers():
    result = python("-c", CODE, str(BENCHMARKS))
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-6000:]
    return json.loads(result.stdout.splitlines()[-1])


def found(layers, family, kind, fault=None):
    (layer,) = [x for x in layers if (x["family"], x["kind"], x.get("fault")) == (family, kind, fault)]
    return layer


def more(layers, family, kind, fault=None):
    return found(layers, family, kind, fault)["launches"] - found(layers, family, "dense")["launches"]


@pytest.mark.parametrize(("kind", "expected"), [("Q/K kept", 3), ("Q/K pruned", 4)])
@pytest.mark.parametrize("family", ["llama", "phi"])
def test_masked_layout_adds_at_most_4_launches_to_a_layer(layers, family, kind, expected):
    """One of route, two of the value mask, and one that fills the padding of pruned Q/K heads."""
    assert expected <= ALLOWED_MORE
    assert more(layers, family, kind) == expected


@pytest.mark.parametrize("kind", ["Q/K kept", "Q/K pruned"])
@pytest.mark.parametrize("family", ["llama", "phi"])
def test_hidden_states_are_not_copied_to_float32(layers, family, kind):
    assert found(layers, family, kind)["float32_copies"] == 0


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_mask_is_fused_into_the_activation(layers, family):
    """Also its multiplication in place: between the two GEMMs of the MLP there is one kernel."""
    names = found(layers, family, "Q/K kept")["names"]
    (activation,) = [name for name in names if "index_select_mul" in name and ("silu" in name or "gelu" in name)]
    before, after = names[names.index(activation) - 1], names[names.index(activation) + 1]
    assert {before, after} <= {"mm", "addmm", "tomoe.route_recorded: route_token_kernel"}


def test_dense_layer_is_what_vllm_compiles(layers):
    """4 GEMMs, 2 norms, rotary embedding, activation, cache update and attention."""
    assert found(layers, "llama", "dense")["names"].count("mm") == 4
    assert found(layers, "llama", "dense")["launches"] == 10


def test_a_float32_copy_is_seen(layers):
    assert found(layers, "llama", "Q/K kept", "float32 copy")["float32_copies"] > 0


def test_one_launch_more_is_seen(layers):
    assert more(layers, "llama", "Q/K pruned", "two launches of route") > ALLOWED_MORE


def test_plain_torch_is_seen(layers):
    assert more(layers, "llama", "Q/K kept", "plain torch") > ALLOWED_MORE
