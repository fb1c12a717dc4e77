"""``tomoe tune``: thresholds from measured times, and the error without a GPU."""

import json

import pytest
import torch

from tomoe_vllm.diagnostics.tune import NEVER, best
from tomoe_vllm.kernels.expert_mlp.triton.dispatch import SHIPPED_FOLDER


@pytest.mark.parametrize(
    ("gather", "grouped", "expected"),
    [
        pytest.param([0.5, 0.7, 1.1, 3.0], [3.0, 2.0, 0.9, 0.5], (2, 256), id="as the roofline model predicts"),
        pytest.param([1.0, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 1.0], (0, NEVER), id="not better at the end: never"),
        pytest.param([0.5, 0.5, 0.5, 0.5], [0.4, 0.4, 0.4, 0.4], (1024, NEVER), id="gather has priority"),
        pytest.param([0.5, 2.0, 0.5, 2.0], [2.0, 0.5, 2.0, 0.5], (1, 1024), id="one fast size is not enough"),
    ],
)
def test_a_path_replaces_dense_only_where_it_was_faster(gather, grouped, expected):
    sizes = (1, 2, 256, 1024)
    times = {"dense": dict.fromkeys(sizes, 1.0)}
    times |= {
        name: dict(zip(sizes, values, strict=True)) for name, values in (("gather", gather), ("grouped", grouped))
    }
    thresholds = best(times)
    assert (thresholds.gather_tokens, thresholds.grouped_tokens) == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune")
def test_tuning_without_a_gpu_is_an_error(run_cli, tmp_path):
    code, out, err = run_cli("tune", "--out", tmp_path)
    assert (code, out) == (2, "")
    assert "tomoe tune needs a GPU; CPUs have one execution path for every number of tokens" in err


def test_default_thresholds_select_the_dense_path():
    values = json.loads((SHIPPED_FOLDER / "default.json").read_text())
    assert values["gather_tokens"] == 0
    assert values["grouped_tokens"] >= NEVER
