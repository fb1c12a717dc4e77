"""Every shipped recipe resolves, and its parameter counts are the published and the analytic ones."""

import json
import re
from pathlib import Path

import pytest
import yaml
from tomoe_training.config import load_run_config
from tomoe_training.data import micro_batches

RECIPES = Path(__file__).resolve().parents[3] / "training" / "recipes"

# Parameters as published by the models' authors (safetensors headers); kept: ToMoE, appendix A.1,
# L d 128 + L 128 d/H + L d N, worked out by hand.
PUBLISHED = {
    "llama2-7b": (6_738_415_616, 18_350_080),
    "llama2-13b": (13_015_864_320, 40 * (5120 * 128 + 128 * 128 + 5120 * 8)),
    "llama3-8b": (8_030_261_248, 18_350_080),
    "qwen2.5-7b": (7_615_616_512, 28 * (3584 * 128 + 128 * 128 + 3584 * 8)),
    "qwen2.5-14b": (14_770_033_664, 48 * (5120 * 128 + 128 * 128 + 5120 * 8)),
    "phi-2": (2_779_683_840, 32 * (2560 * 128 + 128 * 80 + 2560 * 8)),
}


def test_every_recipe_of_the_paper_is_listed_here():
    assert {file.stem for file in RECIPES.glob("*.yaml")} == {*PUBLISHED, "smollm2-135m"}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("active_ratio", [0.3, 0.7])
def test_dry_run_counts_what_was_published(name, active_ratio, run_cli, tmp_path):
    code, out, _ = run_cli(
        "train", "--config", RECIPES / f"{name}.yaml", "--active-ratio", active_ratio, "--dry-run", "--out", tmp_path
    )
    assert code == 0
    facts = json.loads(out.splitlines()[-1])
    assert (facts["dense_parameters"], facts["kept_parameters"]) == PUBLISHED[name]
    assert facts["active_block_parameters_at_most"] == int(active_ratio * facts["total_block_parameters"])
    assert facts["config"]["active_ratio"] == active_ratio


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe_says_what_it_takes_and_what_to_expect(name):
    notes = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())["notes"]
    assert re.fullmatch(r"1, 2, 4 or 8 x A100 80 GB \(the paper: \d\)", notes["hardware"])
    assert re.fullmatch(r"\d+, estimated: .+", notes["gpu_hours"])
    assert any(key.startswith("paper") for key in notes)
    # The sum of memory: weights in bfloat16, what is trained, activations.
    total, parts = notes["memory_gb"].split(" = ")
    terms = [float(part.split()[0]) for part in parts.split(" + ")]
    assert sum(terms) == pytest.approx(float(total), abs=1)
    assert terms[0] == pytest.approx(2e-9 * PUBLISHED[name][0], rel=0.03)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_recipe_runs_on_any_of_its_gpu_counts_with_the_same_micro_batches(name, num_ranks):
    run = load_run_config(RECIPES / f"{name}.yaml", {}, [])
    sizes = (run.batch_size, run.micro_batch_size)
    parts = [part for rank in range(num_ranks) for part in micro_batches(*sizes, rank, num_ranks)]
    assert parts == micro_batches(*sizes, 0, 1)
    assert [row for part in parts for row in part] == list(range(8))


def test_dry_run_without_a_model_or_an_architecture_says_so(run_cli, tmp_path):
    code, _, err = run_cli("train", "--base", tmp_path / "nothing", "--dry-run", "--out", tmp_path / "out")
    assert code == 2
    assert len(err.strip().splitlines()) == 1
    assert "architecture" in err
