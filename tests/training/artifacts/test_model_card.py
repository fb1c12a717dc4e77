"""Model cards: facts of the conversion, perplexities, fine-tuning."""

import json

import pytest
from tomoe_training.artifacts.export import export_checkpoint
from tomoe_training.artifacts.model_card import fine_tuned_card, model_card

from tests.helpers.students import adapter_of, random_student


@pytest.mark.parametrize(
    "training",
    [
        {},
        {
            "steps": 12,
            "tokens": 768,
            "seconds": 7200.0,
            "data": ["a.txt", "self"],
            "provenance": {"command": ["tomoe", "train", "--seed", "3"]},
        },
    ],
)
def test_card_states_budget_data_and_base(training, dense_folder):
    student = random_student(dense_folder())
    widths = student.update_widths()
    config = adapter_of(student, dense_folder()).config
    config.training = training
    card = model_card(config, widths, student.shape)
    assert f"{widths.active_parameters(student.shape):,} of {student.shape.total_parameters * 2:,}" in card
    assert config.base_model_hash in card
    assert "None" not in card
    if training:
        assert "a.txt, self" in card
        assert "12, 768" in card
        assert "2.00 h" in card
        assert "| `tomoe train --seed 3` |" in card


def test_measured_perplexities_are_kept_in_the_card(dense_folder, adapter_folder, text_file, run_cli, tmp_path):
    out = tmp_path / "out"
    export_checkpoint(dense_folder(), adapter_folder(), out, width_multiple=8, head_dim_multiple=4)
    before = (out / "README.md").read_text()
    ppl = {}
    for block_size in (32, 64, 32):
        options = ("--text", text_file, "--block-size", block_size, "--max-blocks", 2, "--record")
        code, stdout, err = run_cli("eval", "ppl", "--model", out, *options)
        assert code == 0, err
        ppl[block_size] = json.loads(stdout)["ppl"]
    card = (out / "README.md").read_text()
    assert card.startswith(before.rstrip())
    rows = [line for line in card.splitlines() if line.startswith("| text.txt")]
    tuned = fine_tuned_card(
        card,
        {"data": ["b.txt"], "steps": 1, "method": "lora", "tokens": 32, "first_loss": 2.0, "final_loss": 1.0}
        | {"dense_hash": "sha256:1", "source_dense_hash": "sha256:0"},
    )
    assert "text.txt" not in tuned  # measured on the weights before
    assert "## Use" in tuned
    assert sorted(rows) == [f"| text.txt | 2 x {b} | float32, hf | {ppl[b]:.2f} |" for b in (32, 64)]


def test_card_of_another_model_is_not_changed(dense_folder, text_file, run_cli):
    options = ("--text", text_file, "--block-size", 32, "--max-blocks", 1, "--record")
    code, _, err = run_cli("eval", "ppl", "--model", dense_folder(), *options)
    assert (code, err.count("\n")) == (2, 1)
    assert "is not a ToMoE checkpoint with a README.md; leave --record out" in err
    assert not (dense_folder() / "README.md").exists()
