"""lm-eval's scores on a local task equal those of a written-out loop, on both backends, dense and converted."""

import json
import shutil
import sys
from pathlib import Path

import lm_eval.tasks
import pytest
import torch
from tomoe_training.artifacts.export import export_checkpoint
from tomoe_training.evaluation.tasks import PRESETS, evaluate_tasks, expand_presets, score_rows
from transformers import AutoModelForCausalLM

from tests.helpers.dense_models import BOS
from tests.helpers.processes import environment, python
from tests.helpers.students import save_untrained_adapter
from tomoe_vllm.hf.register import register_with_transformers

TASKS = Path(__file__).parents[2] / "data" / "tasks"
ROWS = [json.loads(line) for line in (TASKS / "next_word.jsonl").read_text().splitlines()]


@pytest.fixture
def converted(dense_folder, adapter_folder, tmp_path):
    export_checkpoint(dense_folder(), adapter_folder(), tmp_path / "out", width_multiple=8, head_dim_multiple=4)
    return tmp_path / "out"


def _log_likelihood(model, context: str, ending: str) -> float:
    """Log-probability of the ending's words after the context's, in float64, one sequence at a time."""
    first, second = ([3 + int(word[1:]) for word in text.split()] for text in (context, ending))
    ids = [BOS, *first, *second]
    with torch.no_grad():
        log_p = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(log_p[i - 1, ids[i]].item() for i in range(len(ids) - len(second), len(ids)))


def _accuracy_by_loop(folder: Path) -> tuple[float, float]:
    """acc (highest log-likelihood) and acc_norm (highest per character of the ending)."""
    register_with_transformers()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    hits, hits_norm = 0, 0
    for row in ROWS:
        scores = [_log_likelihood(model, row["context"], ending) for ending in row["choices"]]
        per_character = [score / len(ending) for score, ending in zip(scores, row["choices"], strict=True)]
        hits += scores.index(max(scores)) == row["label"]
        hits_norm += per_character.index(max(per_character)) == row["label"]
    return hits / len(ROWS), hits_norm / len(ROWS)


def test_scores_equal_a_written_out_loop(converted, dense_folder):
    for folder in (dense_folder(), converted):
        facts = evaluate_tasks(folder, ["next_word"], task_folder=TASKS)
        score = facts["tasks"]["next_word"]
        assert (score["acc"], score["acc_norm"]) == pytest.approx(_accuracy_by_loop(folder))
        assert (score["num_samples"], score["num_fewshot"]) == (12, 0)
        # lm-eval's standard error of a mean of n zeros and ones.
        assert score["acc_stderr"] == pytest.approx((score["acc"] * (1 - score["acc"]) / (len(ROWS) - 1)) ** 0.5)
        assert facts["mean"] == score["acc_norm"]


def test_every_row_equals_the_written_out_loop(dense_folder, tmp_path):
    # Were a mean right by luck, some single row would not be.
    shutil.copy(TASKS / "next_word_train.jsonl", tmp_path)
    shutil.copy(TASKS / "next_word.yaml", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(dense_folder(), dtype=torch.float32).eval()
    best = []
    for row in ROWS:
        scores = [_log_likelihood(model, row["context"], ending) for ending in row["choices"]]
        best.append(scores.index(max(scores)))
    labelled = [row | {"label": label} for row, label in zip(ROWS, best, strict=True)]
    (tmp_path / "next_word.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    assert evaluate_tasks(dense_folder(), ["next_word"], task_folder=tmp_path)["tasks"]["next_word"]["acc"] == 1.0


def test_command_prints_a_table_and_one_json_line(run_cli, dense_folder):
    code, out, err = run_cli(
        "eval", "tasks", "--model", dense_folder(), "--tasks", "next_word", "--task-folder", TASKS,
        "--num-fewshot", 2, "--limit", 5, "--batch-size", 3,
    )  # fmt: skip
    assert code == 0, err
    facts = json.loads(out)
    score = facts["tasks"]["next_word"]
    assert (score["num_fewshot"], score["num_samples"], facts["limit"]) == (2, 5, 5)
    assert (facts["backend"], facts["dtype"]) == ("hf", "float32")
    assert "acc_norm" in err


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("is_converted", [False, True], ids=["dense", "converted"])
def test_vllm_backend_equals_a_written_out_loop(is_converted, dense_folder, tmp_path):
    folder = dense_folder(hidden_size=128)  # head_dim 32: what vLLM's CPU attention takes
    if is_converted:
        save_untrained_adapter(tmp_path / "adapter", folder)
        export_checkpoint(folder, tmp_path / "adapter", tmp_path / "out", width_multiple=8, head_dim_multiple=4)
        folder = tmp_path / "out"
    arguments = ("eval", "tasks", "--model", folder, "--tasks", "next_word", "--task-folder", TASKS)
    env = environment(VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_CPU_KVCACHE_SPACE="1")
    result = python("-m", "tomoe_vllm.cli", *arguments, "--backend", "vllm", env=env, timeout=900)
    assert result.returncode == 0, result.stderr[-2000:]
    score = json.loads(result.stdout.splitlines()[-1])["tasks"]["next_word"]
    assert (score["acc"], score["acc_norm"]) == pytest.approx(_accuracy_by_loop(folder))


# --------------------------------------------------------------------------------------------- presets
def test_presets_have_the_shots_of_the_paper():
    shots = expand_presets(["few-shot"])
    assert (shots["boolq"], shots["arc_challenge"], shots["hellaswag"], shots["mmlu"]) == (32, 25, 10, 5)
    assert expand_presets(["zero-shot", "gsm8k"]) == dict.fromkeys(PRESETS["zero-shot"], 0) | {"gsm8k": None}


def test_a_preset_runs_offline_on_local_tasks_of_its_names(dense_folder, tmp_path):
    # The folder redefines the preset's tasks on local rows, so its shots are seen without a hub.
    for name in ("next_word.jsonl", "next_word_train.jsonl"):
        shutil.copy(TASKS / name, tmp_path)
    for task in PRESETS["few-shot"]:
        text = (TASKS / "next_word.yaml").read_text().replace("task: next_word", f"task: {task}")
        (tmp_path / f"{task}.yaml").write_text(text)
    rows = (tmp_path / "next_word_train.jsonl").read_text()
    (tmp_path / "next_word_train.jsonl").write_text(rows * 8)
    facts = evaluate_tasks(dense_folder(), ["few-shot"], task_folder=tmp_path, limit=1)
    shots = {task: score["num_fewshot"] for task, score in facts["tasks"].items()}
    assert shots == {task: count or 0 for task, count in PRESETS["few-shot"].items()}


# ---------------------------------------------------------------------------------------------- misuse
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "onnx"}, "backend is 'onnx'; it must be one of hf, vllm"),
        ({"dtype": "int8"}, "dtype is 'int8'; it must be one of auto, float32, bfloat16, float16"),
        ({"limit": 0}, "limit is 0; it must be at least 1"),
        ({"num_fewshot": -1}, "num_fewshot is -1; it must be at least 0"),
        ({"names": []}, "no tasks: give --tasks a,b,c"),
        ({"names": ["piqa", "zero-shot"]}, "task 'piqa' is named twice"),
        ({"task_folder": Path("/nowhere")}, "no such task folder: /nowhere"),
    ],
)
def test_misuse_is_an_error(options, message, dense_folder):
    names = options.pop("names", ["next_word"])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluate_tasks(dense_folder(), names, **options)


def test_unknown_task_error_lists_similar_names(run_cli, dense_folder, monkeypatch):
    real = lm_eval.tasks.TaskManager
    # Reading lm-eval's own 15,000 names takes ten seconds; the slow test below does.
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **options: real(**options | {"include_defaults": False}))
    code, out, err = run_cli(
        "eval", "tasks", "--model", dense_folder(), "--tasks", "next_wrod", "--task-folder", TASKS
    )  # fmt: skip
    assert (code, out) == (2, "")
    assert err == "tomoe: unknown task 'next_wrod'; did you mean next_word? (tasks of your own: --task-folder)\n"


@pytest.mark.slow
def test_tasks_of_presets_exist_in_lm_eval(dense_folder):
    with pytest.raises(ValueError, match="unknown task 'helaswag'; did you mean hellaswag or "):
        evaluate_tasks(dense_folder(), ["helaswag"])
    known = lm_eval.tasks.TaskManager().task_index
    assert [task for preset in PRESETS.values() for task in preset if task not in known] == []


def test_unreachable_hub_is_one_line(run_cli, dense_folder, tmp_path):
    (tmp_path / "far.yaml").write_text(
        (TASKS / "next_word.yaml").read_text().replace("task: next_word", "task: far").replace(": json", ": no/where")
    )
    code, out, err = run_cli("eval", "tasks", "--model", dense_folder(), "--tasks", "far", "--task-folder", tmp_path)
    assert (code, out) == (2, "")
    assert "task 'far' needs a data set of the Hugging Face hub, which cannot be reached" in err
    assert err.count("\n") == 1


def test_missing_local_rows_are_one_line(run_cli, dense_folder, tmp_path):
    shutil.copy(TASKS / "next_word.yaml", tmp_path)
    code, _, err = run_cli(
        "eval", "tasks", "--model", dense_folder(), "--tasks", "next_word", "--task-folder", tmp_path
    )
    assert code == 2
    assert "the data of task 'next_word' cannot be loaded" in err
    assert err.count("\n") == 1


def test_missing_lm_eval_error_names_the_extra(run_cli, dense_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    code, _, err = run_cli("eval", "tasks", "--model", dense_folder(), "--tasks", "piqa")
    assert code == 1
    assert "pip install './tomoe-vllm[eval]'" in err
    assert err.count("\n") == 1


def test_table_has_scores_only():
    scores = {
        "a": {"num_fewshot": 0, "num_samples": 3, "acc": 0.5, "acc_stderr": 0.25, "alias": None},
        "g": {"num_fewshot": 5, "num_samples": 2, "exact_match,strict": 1.0, "exact_match_stderr,strict": None},
    }
    assert score_rows(scores) == [
        ["a", "0", "3", "acc", "0.5000 ± 0.2500"],
        ["g", "5", "2", "exact_match,strict", "1.0000"],
    ]
