"""``tomoe eval compare``: one table of all methods, and errors before any computation."""

import json
import math

import pytest
import torch
import yaml
from tomoe_training.artifacts.adapter import Adapter
from tomoe_training.artifacts.export import export_checkpoint
from tomoe_training.artifacts.inspection import inspect
from tomoe_training.evaluation.compare import METHODS, compare, comparison_config
from tomoe_training.evaluation.perplexity import evaluate_perplexity

from tests.helpers.dense_models import save_dense_model

TINY = {
    "num_experts": 4,
    "value_router_dim": 16,
    "width_multiple": 8,
    "head_dim_multiple": 4,
    "sequence_length": 32,
    "warm_start_tokens": 256,
    "dtype": "float32",
    "tensorboard": False,
}
SETS = [part for key, value in TINY.items() for part in ("--set", f"{key}={json.dumps(value)}")]
BLOCKS = {"block_size": 64, "max_blocks": 4}


@pytest.fixture
def arguments(dense_folder, text_file):
    """``arguments("--out", x)``: the command on the tiny llama, 6 steps, p = 0.6."""

    def make(*more):
        return [
            "eval", "compare", "--base", dense_folder(), "--data", text_file, "--text", text_file,
            "--active-ratio", 0.6, "--steps", 6, "--block-size", 64, "--max-blocks", 4, *SETS, *more,
        ]  # fmt: skip

    return make


@pytest.fixture
def config(dense_folder, text_file):
    """``config(adapter=..., steps=3)``: settings of a comparison on the tiny llama."""

    def make(adapter=None, **fields):
        flags = {"base": str(dense_folder()), "data": [str(text_file)], "steps": 3} | TINY | fields
        return comparison_config(None, adapter, flags, [])

    return make


def test_one_command_gives_one_table_of_all_methods(run_cli, arguments, tmp_path, text_file):
    code, out, err = run_cli(*arguments("--out", tmp_path / "table.json"))
    assert code == 0, err
    table = json.loads(out)
    assert out.count("\n") == 1
    assert [row["method"] for row in table["rows"]] == ["dense", *METHODS]
    assert (table["scored_tokens"], table["data"], table["active_ratio"]) == (4 * 63, [text_file.name], 0.6)
    for row in table["rows"]:
        assert row["method"] in err
        assert math.isfinite(row["ppl"])
        assert row["seconds"] >= 0
    ratios = {row["method"]: row["active_ratio"] for row in table["rows"]}
    assert ratios.pop("dense") == 1.0
    assert all(0.5 < ratio <= 0.6 for ratio in ratios.values())
    tokens = {row["method"]: row["tokens"] for row in table["rows"]}
    trained = dict.fromkeys(("tomoe", "static_mask", "random_experts"), 6 * 2 * 32)
    calibrated = dict.fromkeys(("wanda", "wanda_mlp", "cmoe"), 256)
    assert tokens == {"dense": 0, "magnitude": 0, "magnitude_mlp": 0} | trained | calibrated
    assert len({row["ppl"] for row in table["rows"]}) == len(table["rows"])
    written = json.loads((tmp_path / "table.json").read_text())
    assert {key: written[key] for key in table} == table
    assert written["config"]["steps"] == 6
    assert "versions" in written["provenance"]


def test_dense_row_is_the_dense_perplexity(config, dense_folder, text_file):
    dense = compare(config(), text_file, methods=["magnitude"], **BLOCKS)["rows"][0]
    expected = evaluate_perplexity(dense_folder(), text_file, dtype="float32", **BLOCKS)["ppl"]
    assert dense["ppl"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("vo_mode", ["dynamic", "static", "none"])
def test_tomoe_row_is_that_of_the_exported_adapter(vo_mode, config, dense_folder, adapter_folder, text_file, tmp_path):
    adapter = adapter_folder(vo_mode=vo_mode)
    run = config(adapter, active_ratio=0.7)
    row = compare(run, text_file, adapter=adapter, methods=["tomoe"], **BLOCKS)["rows"][1]
    export_checkpoint(
        dense_folder(), adapter, tmp_path / "out", active_ratio=0.7, width_multiple=8, head_dim_multiple=4
    )  # fmt: skip
    expected = evaluate_perplexity(tmp_path / "out", text_file, dtype="float32", **BLOCKS)["ppl"]
    assert row["ppl"] == pytest.approx(expected, rel=1e-6)
    assert row["active_ratio"] == inspect(tmp_path / "out")["active_ratio"] <= 0.7
    assert row["note"] == "trained on none"  # not on this comparison's data


def test_baselines_train_with_the_settings_of_the_adapter(adapter_folder, dense_folder, tmp_path):
    adapter = Adapter.load(adapter_folder())
    adapter.config.training = {"config": {"steps": 7, "batch_size": 3, "learning_rate": 0.5, "gone_setting": 1}}
    adapter.save(tmp_path / "adapter")
    run = comparison_config(None, tmp_path / "adapter", {"base": "b"}, [])
    assert (run.steps, run.batch_size, run.learning_rate) == (7, 3, 0.5)
    assert (run.num_experts, run.active_ratio, run.value_router_dim) == (4, 0.6, 16)
    run = comparison_config(None, tmp_path / "adapter", {"steps": 9, "active_ratio": None}, ["batch_size=1"])
    assert (run.steps, run.batch_size, run.active_ratio) == (9, 1, 0.6)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"steps": 5}))
    assert comparison_config(tmp_path / "run.yaml", tmp_path / "adapter", {}, []).batch_size == 2


def test_trained_adapters_in_the_work_folder_are_reused(config, text_file, tmp_path, monkeypatch):
    run = config()
    first = compare(run, text_file, methods=["static_mask"], work=tmp_path / "work", **BLOCKS)
    assert (tmp_path / "work" / "static_mask" / "adapter.safetensors").is_file()
    monkeypatch.setattr("tomoe_training.trainer._Run._step", None)
    again = compare(run, text_file, methods=["static_mask"], work=tmp_path / "work", **BLOCKS)
    assert again["rows"][1] == first["rows"][1]


def test_budget_below_the_attention_gives_a_row_with_the_reason(config, dense_folder, text_file, capfd):
    run = config(base=str(dense_folder("phi")), active_ratio=0.6)
    rows = compare(run, text_file, methods=["magnitude", "cmoe"], **BLOCKS)["rows"]
    assert rows[1]["ppl"] is not None
    assert (rows[2]["ppl"], rows[2]["active_ratio"]) == (None, None)
    assert "attention alone uses 0.625 of the block parameters" in rows[2]["note"]
    assert "attention alone" in capfd.readouterr().err


def test_result_of_a_method_does_not_depend_on_the_others(config, text_file):
    alone = compare(config(), text_file, methods=["cmoe", "random_experts"], **BLOCKS)["rows"]
    after = compare(config(), text_file, methods=["magnitude", "cmoe", "random_experts"], **BLOCKS)["rows"]
    assert [row["ppl"] for row in alone[-2:]] == [row["ppl"] for row in after[-2:]]


# --------------------------------------------------------------------------------------------- misuse
@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--method", "wnada"], "unknown method 'wnada'; did you mean 'wanda'?"),
        (["--method", "x"], "unknown method 'x'; known: tomoe, magnitude"),
        (["--text", "/nowhere.txt"], "no such text file: /nowhere.txt"),
        (["--base", "/nowhere"], "/nowhere is not a model folder"),
        (["--active-ratio", "1.5"], "active_ratio is 1.5; it must be at most 1"),
        (["--active-ratio", "0.01"], "below the narrowest model"),
        (["--steps", "0"], "steps is 0; it must be at least 1"),
        (["--block-size", "1"], "block_size is 1; it must be at least 2"),
        (["--block-size", "100000"], "the text has 6001 tokens, less than one block of 100000"),
        (["--set", "stpes=3"], "unknown setting 'stpes'; did you mean 'steps'?"),
        (["--data", "/nowhere.txt"], "no such data file: /nowhere.txt"),
        (["--data", "self"], "compare needs training text in files or data sets"),
        (["--adapter", "/nowhere"], "/nowhere is not an adapter"),
        (["--config", "/nowhere.yaml"], "no such configuration file: /nowhere.yaml"),
    ],
)
def test_misuse_is_one_line(more, expected, run_cli, arguments):
    code, out, err = run_cli(*arguments(*more))
    assert (code, out) == (2, "")
    last = err.splitlines()[-1]
    assert last.startswith("tomoe: ")
    assert expected in last
    if "narrowest" not in expected:  # which is found when the first method is made
        assert err.count("\n") == 1, err


def test_no_data_is_one_line(run_cli, dense_folder, text_file):
    code, _, err = run_cli("eval", "compare", "--base", dense_folder(), "--text", text_file)
    assert code == 2
    assert err.startswith("tomoe: compare needs training text")


def test_adapter_of_another_model_is_one_line(run_cli, arguments, adapter_folder, tmp_path):
    save_dense_model(tmp_path / "other", "llama", seed=5)
    code, _, err = run_cli(*arguments("--adapter", adapter_folder(), "--base", tmp_path / "other"))
    assert code == 2
    assert "the adapter was trained on llama" in err.splitlines()[-1]


def test_existing_output_file_is_not_overwritten(run_cli, arguments, tmp_path):
    (tmp_path / "table.json").write_text("mine")
    code, _, err = run_cli(*arguments("--out", tmp_path / "table.json"))
    assert code == 2
    assert "already exists; choose another --out" in err
    assert (tmp_path / "table.json").read_text() == "mine"


def test_a_method_over_its_budget_stops_the_comparison(config, text_file, monkeypatch):
    magnitude = METHODS["magnitude"]

    def over_budget(setup):
        gates = magnitude(setup)
        gates.widths.experts[0] += 32
        return gates

    monkeypatch.setitem(METHODS, "magnitude", over_budget)
    with pytest.raises(AssertionError, match="magnitude"):
        compare(config(active_ratio=0.6), text_file, methods=["magnitude"], **BLOCKS)
    assert torch.is_grad_enabled()
