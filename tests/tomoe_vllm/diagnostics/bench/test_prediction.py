"""Notes of tomoe bench on rows that are not expected to be faster than dense."""

import pytest

from tomoe_vllm.diagnostics.bench.prediction import not_expected_faster, predict
from tomoe_vllm.hf.configuration_tomoe import CONFIG_CLASSES


@pytest.fixture
def config():
    layers = 32
    return CONFIG_CLASSES["llama"](
        num_hidden_layers=layers, vo_head_dims=[64] * layers, qk_head_dims=[128] * layers,
        expert_intermediate_sizes=[5504] * layers,
    )  # fmt: skip


def rows() -> dict:
    decode = [("shared_gather", 1), ("shared_dense", 4), ("masked", 16), ("fused", 64)]
    return {
        "decode": [{"path": path, "batch": batch} for path, batch in decode],
        "prefill": [{"path": "shared_grouped", "prompt_tokens": 4096}],
    }


def test_every_path_has_a_prediction_on_a_known_gpu(config):
    results = rows()
    predict(results, config, "NVIDIA H100 80GB HBM3")
    ratios = [row["predicted_ratio"] for part in results.values() for row in part]
    assert len(ratios) == 5
    gather, dense, masked, fused, grouped = ratios
    assert gather > 1.1
    assert grouped > 1.2
    assert 0.8 < masked < 1
    assert 0.8 < dense < 1
    assert fused < 1
    lines = not_expected_faster(results)
    assert [line.rpartition(" the path ")[2].split()[0] for line in lines] == ["shared_dense", "masked", "fused"]
    assert f"decode, batch 4: the path shared_dense is predicted to run at {dense:.2f} x dense" in lines[0]


@pytest.mark.parametrize("gpu", [None, "NVIDIA A10"])
def test_elsewhere_the_paths_that_do_the_work_of_dense_are_named(config, gpu):
    results = rows()
    predict(results, config, gpu)
    lines = not_expected_faster(results)
    assert len(lines) == 2
    assert "the path shared_dense reads and multiplies all neurons like the dense MLP" in lines[0]
    assert not_expected_faster({"decode": [{"path": "shared_rows", "batch": 1}]}) == []
