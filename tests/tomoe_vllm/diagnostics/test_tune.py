"""``tomoe tune``: thresholds from measured times, the layers it measures, and the error without a GPU."""

import json

import pytest
import torch

from tomoe_vllm.diagnostics.tune import Measurement, best, layer_kinds, token_counts
from tomoe_vllm.kernels.expert_mlp.triton.dispatch import DENSE_ONLY, NEVER, Thresholds

SIZES = (1, 2, 256, 1024)
ONES = [1.0] * 4


def measured(gather, grouped, dense=ONES, vllm=ONES, failures=()) -> Measurement:
    times = {"gather": gather, "grouped": grouped, "dense": dense, "vllm": vllm}
    ms = {path: dict(zip(SIZES, values, strict=True)) for path, values in times.items()}
    return Measurement(ms=ms, failures=dict.fromkeys(failures, "wrong"))


@pytest.mark.parametrize(
    ("gather", "grouped", "expected"),
    [
        pytest.param([0.5, 0.7, 1.1, 3.0], [3.0, 2.0, 0.9, 0.5], (2, 256), id="as the cost model predicts"),
        pytest.param([0.5, 1.5, 0.5, 0.5], [0.5, 0.5, 0.5, 1.0], (1, NEVER), id="not better at the end: never"),
        pytest.param([0.5, 0.5, 0.5, 0.5], [0.4, 0.4, 0.4, 0.4], (1024, NEVER), id="gather has priority"),
        pytest.param([0.5, 2.0, 0.5, 2.0], [2.0, 0.5, 2.0, 0.5], (1, 1024), id="one fast size is not enough"),
    ],
)
def test_a_path_replaces_dense_only_where_it_was_faster(gather, grouped, expected):
    thresholds, reason = best(measured(gather, grouped))
    assert (thresholds.gather_tokens, thresholds.grouped_tokens) == expected
    assert reason.startswith("2.00 x vLLM's dense MLP at ")


SPARSE = {"gather": [0.5, 0.7, 1.1, 3.0], "grouped": [3.0, 2.0, 0.9, 0.5]}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        pytest.param({"gather": ONES, "grouped": ONES}, "no sparse path is faster", id="nothing gained"),
        pytest.param(
            {"vllm": [0.4, 1.0, 1.0, 0.4]},
            "0.80 x vLLM's dense MLP at 1 tokens",
            id="faster than our dense path, not than vLLM's",
        ),
        pytest.param(
            {"dense": [1.0, 1.0, 1.04, 1.0], "grouped": [3.0, 2.0, 1.1, 0.5]},
            "not worth it: 0.96 x vLLM's dense MLP at 256 tokens",
            id="W_down in rows is slower in between",
        ),
        pytest.param({"failures": [("dense", 256)]}, "the dense path is wrong at 256 tokens", id="wrong"),
    ],
)
def test_the_shared_layout_may_not_be_worth_it(changes, reason):
    thresholds, words = best(measured(**(SPARSE | changes)))
    assert thresholds == DENSE_ONLY
    assert reason in words


def test_a_size_with_wrong_values_is_never_chosen():
    thresholds, _ = best(measured(**SPARSE, failures=[("gather", 2), ("grouped", 256)]))
    assert (thresholds.gather_tokens, thresholds.grouped_tokens) == (1, 1024)


def test_sizes_beyond_the_largest_checked_one_use_the_dense_path():
    thresholds, _ = best(measured(**SPARSE))
    assert thresholds == Thresholds(gather_tokens=2, grouped_tokens=256, max_tokens=1024)
    assert thresholds.path(1025) == "dense"


def test_token_counts_end_with_the_largest_step_of_the_engine():
    assert token_counts(8192)[-1] == 8192
    assert token_counts(5000)[-2:] == [4096, 5000]
    assert set(range(1, 9)) < set(token_counts(2048))


def save_config(folder, **fields):
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 4} | fields))
    return folder


def test_layers_of_a_model_are_measured_per_rank_at_each_share_of_neurons(tmp_path):
    folder = save_config(
        tmp_path, model_type="tomoe_llama", hidden_size=64, intermediate_size=1600, num_experts=5,
        expert_intermediate_sizes=[800, 790, 400, 1600],
    )  # fmt: skip
    shapes = [kind.shape for kind in layer_kinds(folder, "7b-layer", 2, "float16")]
    assert [shape.width for shape in shapes] == [200, 400, 800]
    assert {(s.hidden_size, s.num_neurons, s.num_experts, s.num_matrices, s.dtype) for s in shapes} == {
        (64, 800, 5, 3, torch.float16)
    }


def test_a_model_without_gate_is_measured_with_its_activation(tmp_path):
    folder = save_config(tmp_path, model_type="phi", hidden_size=64, intermediate_size=256, hidden_act="gelu_new")
    (kind,) = layer_kinds(folder, "7b-layer", 1, "bfloat16")
    assert (kind.shape.num_matrices, kind.shape.width) == (2, 128)
    assert (kind.activation, kind.has_bias) == ("gelu_new", True)


def test_a_named_shape_can_be_measured_and_ranks_must_divide_it():
    (kind,) = layer_kinds(None, "7b-layer", 8, "bfloat16")
    assert (kind.shape.num_neurons, kind.shape.width) == (1376, 688)
    with pytest.raises(ValueError, match="tensor parallel size 3 does not divide intermediate_size 11008"):
        layer_kinds(None, "7b-layer", 3, "bfloat16")


@pytest.mark.parametrize("width", [790, 800])
def test_the_engine_finds_the_table_that_tune_wrote(tmp_path, monkeypatch, width):
    """The keys of both sides, for a layer of a tensor-parallel rank."""
    from tests.helpers.tiny_models import tiny_config
    from tomoe_vllm.kernels.expert_mlp.triton import dispatch
    from tomoe_vllm.layers.mlp import layout

    config = tiny_config("llama", intermediate_size=1600, expert_intermediate_sizes=[width] * 3)
    config.save_pretrained(tmp_path)
    monkeypatch.setenv(dispatch.FOLDER_VARIABLE, str(tmp_path / "tuned"))
    monkeypatch.setattr(layout, "get_tensor_model_parallel_world_size", lambda: 2)
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.bfloat16)
    tuned = Thresholds(gather_tokens=3, grouped_tokens=640, max_tokens=8192)
    for kind in layer_kinds(tmp_path, "7b-layer", 2, "bfloat16"):
        dispatch.write_table(kind.shape, tuned)
    dispatch.load_thresholds.cache_clear()
    assert {dispatch.load_thresholds(shape) for shape in layout.layer_shapes(config)} == {tuned}
    dispatch.load_thresholds.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune")
def test_tuning_without_a_gpu_is_an_error(run_cli, tmp_path):
    code, out, err = run_cli("tune", "--out", tmp_path)
    assert (code, out) == (2, "")
    assert "tomoe tune needs a GPU; CPUs have one execution path for every number of tokens" in err
