"""The roofline model against exact enumeration, and its figures in docs/performance.md."""

import itertools
import json

import pytest

from tests.helpers.processes import REPOSITORY, python
from tomoe_vllm.diagnostics.roofline import CHIPS, LLAMA_2_7B, MLPShape, chip_named, costs, distinct_experts

A100, H100, H200 = CHIPS


@pytest.mark.parametrize(("num_tokens", "num_experts"), [(1, 8), (2, 8), (3, 4), (5, 3)])
def test_distinct_experts_equal_the_enumeration_of_all_routings(num_tokens, num_experts):
    counts = [0] * (num_experts + 1)
    for routing in itertools.product(range(num_experts), repeat=num_tokens):
        counts[len(set(routing))] += 1
    expected = [count / num_experts**num_tokens for count in counts]
    assert distinct_experts(num_tokens, num_experts) == pytest.approx(expected)


def test_dense_weights_of_llama_2_7b():
    assert LLAMA_2_7B.weight_bytes == 2 * 3 * 4096 * 11008 * 32  # 8.66 GB
    assert LLAMA_2_7B.flops_per_token == 2 * 3 * 4096 * 11008 * 32


@pytest.mark.parametrize(
    ("path", "num_tokens", "speedup"),
    [
        ("gather", 1, 2.0),
        ("gather", 2, 1 / 0.71875),  # one expert with probability 1/8 (half of P), else two (3/4 of P)
        ("materialised", 2, 1 / 0.9375),  # 1.875 experts on average, each half of P
        ("grouped", 4096, 2.0),
        ("materialised", 4096, 2.0),
    ],
)
@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_speedup_over_dense(path, num_tokens, speedup, chip):
    paths = costs(LLAMA_2_7B, num_tokens)
    assert paths["dense"].seconds(chip) / paths[path].seconds(chip) == pytest.approx(speedup, rel=1e-3)


def test_materialised_experts_read_more_than_dense_from_three_tokens_on():
    assert [costs(LLAMA_2_7B, m)["materialised"].memory_bytes > LLAMA_2_7B.weight_bytes for m in (2, 3)] == [
        False,
        True,
    ]


def test_dense_becomes_compute_bound_at_the_ridge_point():
    for chip in CHIPS:
        ridge = chip.flops / chip.bandwidth
        below, above = (costs(LLAMA_2_7B, m)["dense"].seconds(chip) for m in (int(ridge) - 1, int(ridge) + 2))
        assert below == pytest.approx(LLAMA_2_7B.weight_bytes / chip.bandwidth)
        assert above > below


def test_more_active_neurons_cost_more():
    narrow, wide = (MLPShape(hidden_size=64, num_neurons=100, width=w) for w in (30, 70))
    for path in ("materialised", "gather", "grouped"):
        assert costs(narrow, 4)[path].seconds(A100) < costs(wide, 4)[path].seconds(A100)


def test_script_prints_the_tables_of_the_documentation_and_json():
    result = python(REPOSITORY / "benchmarks" / "roofline.py")
    assert result.returncode == 0, result.stderr
    *lines, last = result.stdout.splitlines()
    steps, mlps = "\n".join(lines).split("\n\n")
    documentation = (REPOSITORY / "docs" / "performance.md").read_text()
    assert f"\n{steps}\n" in documentation
    assert f"\n{mlps}\n" in documentation
    assert json.loads(last)["active_ratio"] == 0.5


@pytest.mark.parametrize(
    ("name", "chip"),
    [
        ("NVIDIA A100-SXM4-80GB", A100),
        ("NVIDIA H100 80GB HBM3", H100),
        ("NVIDIA H200", H200),
        ("NVIDIA A100-SXM4-40GB", None),  # 1.6 TB/s
        ("NVIDIA H100 PCIe", None),  # 2.0 TB/s
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA L4", None),
    ],
)
def test_chips_are_found_by_the_names_of_torch(name, chip):
    assert chip_named(name) is chip


def test_script_accepts_p_and_refuses_an_invalid_one():
    result = python(REPOSITORY / "benchmarks" / "roofline.py", "--active-ratio", "0.25")
    assert "| A100 | 1 | 4.25 (1.00x) | 1.06 (4.00x) |" in result.stdout
    assert python(REPOSITORY / "benchmarks" / "roofline.py", "--active-ratio", "1.5").returncode == 2
