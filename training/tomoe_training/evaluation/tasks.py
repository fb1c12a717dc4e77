"""``tomoe eval tasks``: EleutherAI's lm-eval on a dense or converted model, with its `hf` or `vllm` model type.

Prompts, metrics and standard errors are lm-eval's, so that results are comparable with published ones of the
same version. This module adds the model families, the paper's presets, tasks from a local folder, and errors of
one line. Tasks are loaded before the model: an unknown name or an unreachable data set is reported after
seconds. See docs/evaluation.md.
"""

import contextlib
import difflib
import math
import time
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from tomoe_training.artifacts.model_check import check_model
from tomoe_training.dtypes import EVALUATION_DTYPES, default_device, evaluation_dtype
from tomoe_vllm.hf.register import register_with_transformers

PRESETS: dict[str, dict[str, int | None]] = {
    "zero-shot": dict.fromkeys(("hellaswag", "arc_easy", "arc_challenge", "piqa", "winogrande"), 0),
    "few-shot": {
        "boolq": 32,
        "sciq": 0,
        "winogrande": 5,
        "arc_challenge": 25,
        "hellaswag": 10,
        "truthfulqa_mc2": None,  # its prompt has six fixed questions and answers
        "mmlu": 5,
    },
    "generation": {"gsm8k": None, "ifeval": None},
}
"""Tasks and shots of the paper's tables (None: the default of the task), and two tasks that generate text."""

BACKENDS = ("hf", "vllm")
HF_BATCH_SIZE = 8


def evaluate_tasks(
    folder: Path,
    names: list[str],
    *,
    backend: str = "hf",
    task_folder: Path | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    dtype: str = "auto",
    use_chat_template: bool = False,
) -> dict[str, Any]:
    """``tomoe eval tasks``: scores of a model folder, JSON-ready.

    ``names`` are lm-eval tasks, groups, tags or :data:`PRESETS`. ``tasks`` of the result maps each to its
    metrics with their standard errors (``acc``, ``acc_stderr``, ``acc_norm``, ...), ``num_fewshot`` and
    ``num_samples``; ``mean`` is the mean of acc_norm, or of acc where a task has no acc_norm.
    Raises ``ValueError`` for bad options and unknown tasks, ``OSError`` for a data set that cannot be loaded and
    ``ModuleNotFoundError`` without lm-eval.
    """
    check_model(folder, may_be_quantized=backend == "vllm")
    for option, value, allowed in (("backend", backend, BACKENDS), ("dtype", dtype, EVALUATION_DTYPES)):
        if value not in allowed:
            raise ValueError(f"{option} is {value!r}; it must be one of {', '.join(allowed)}")
    least_values = (("num_fewshot", num_fewshot, 0), ("limit", limit, 1), ("batch_size", batch_size, 1))
    for option, number, least in least_values:
        if number is not None and number < least:
            raise ValueError(f"{option} is {number}; it must be at least {least}")
    shots = expand_presets(names)
    lm_eval = _import_lm_eval()
    register_with_transformers()
    dtype = evaluation_dtype(dtype, AutoConfig.from_pretrained(folder).dtype, default_device())
    folder = folder.absolute()  # the working folder changes below
    with _working_folder(task_folder):
        manager, loaded = _load_tasks(shots, has_folder=task_folder is not None)
        started = time.perf_counter()
        with _language_model(folder, backend, dtype, batch_size) as model:
            results = lm_eval.simple_evaluate(
                model=model,
                tasks=[item for items in loaded.values() for item in items],
                num_fewshot=num_fewshot,
                limit=limit,
                apply_chat_template=use_chat_template,
                log_samples=False,
                task_manager=manager,
            )
        seconds = time.perf_counter() - started
    scores = {_name(item): _score(results, item) for items in loaded.values() for item in items}
    accuracies: list[Any] = [score.get("acc_norm", score.get("acc")) for score in scores.values()]
    has_mean = None not in accuracies
    return {
        "tasks": scores,
        "mean": sum(accuracies) / len(accuracies) if has_mean else None,
        "model": str(folder),
        "backend": backend,
        "dtype": dtype,
        "limit": limit,
        "chat_template": use_chat_template,
        "lm_eval": version("lm_eval"),
        "seconds": round(seconds, 1),
    }


def expand_presets(names: list[str]) -> dict[str, int | None]:
    """Tasks and shots (None: the default of the task) for a list of tasks and presets.

    Raises ``ValueError`` for an empty list and for a task that occurs twice.
    """
    pairs = [pair for name in names for pair in (PRESETS[name].items() if name in PRESETS else [(name, None)])]
    if not pairs:
        raise ValueError(f"no tasks: give --tasks a,b,c with lm-eval's names, or a preset ({', '.join(PRESETS)})")
    shots = dict(pairs)
    if len(shots) < len(pairs):
        listed = [task for task, _ in pairs]
        twice = next(task for task in listed if listed.count(task) > 1)
        raise ValueError(f"task {twice!r} is named twice; evaluate it once per run (presets share tasks)")
    return shots


def _import_lm_eval():
    try:
        import lm_eval.tasks
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"tomoe eval tasks needs lm-eval ({error}); install it with: pip install './tomoe-vllm[eval]'"
        ) from error
    return lm_eval


@contextlib.contextmanager
def _language_model(folder: Path, backend: str, dtype: str, batch_size: int | None) -> Iterator[Any]:
    """lm-eval's model of a folder. No remote code: the ToMoE families are registered in both backends."""
    from lm_eval.api.registry import get_model

    arguments: dict[str, Any] = {"pretrained": str(folder), "dtype": dtype}
    if backend == "vllm":
        arguments |= {"enforce_eager": True, "batch_size": batch_size or "auto"}
    else:
        arguments |= {"backend": "causal", "device": str(default_device()), "batch_size": batch_size or HF_BATCH_SIZE}
    model = get_model(backend)(**arguments)
    try:
        yield model
    finally:
        if backend == "vllm":  # its processes log to standard output when they end: end them before the JSON line
            model.model.llm_engine.engine_core.shutdown()


@contextlib.contextmanager
def _working_folder(folder: Path | None) -> Iterator[None]:
    """Change to the task folder, so that relative ``data_files`` in its YAML files are read from there."""
    if folder is None:
        yield
        return
    if not folder.is_dir():
        raise FileNotFoundError(f"no such task folder: {folder}")
    with contextlib.chdir(folder):
        yield


def _load_tasks(shots: dict[str, int | None], *, has_folder: bool) -> tuple[Any, dict[str, list]]:
    """lm-eval's task manager, and the loaded tasks and groups by requested name."""
    import datasets

    datasets.disable_progress_bars()
    manager = _task_manager(shots, has_folder=has_folder)
    loaded: dict[str, list] = {}
    for name, num_fewshot in shots.items():
        try:
            found = manager.load([name])
        except ConnectionError as error:
            raise ConnectionError(
                f"task {name!r} needs a data set of the Hugging Face hub, which cannot be reached: {error}. Give "
                "--task-folder with a task of that name on local files (docs/evaluation.md)"
            ) from error
        except OSError as error:
            raise OSError(f"the data of task {name!r} cannot be loaded: {error}") from error
        for task in found["tasks"].values() if num_fewshot is not None else ():
            task.set_config("num_fewshot", num_fewshot)
        top = found["groups"].get(name)
        loaded[name] = [top] if top else list(found["tasks"].values())
    return manager, loaded


def _task_manager(names: Iterable[str], *, has_folder: bool):
    """A task manager that has all ``names``: tasks of the working folder (if ``has_folder``) and of lm-eval."""
    from lm_eval.tasks import TaskManager

    if has_folder:
        own = TaskManager(include_path=".", include_defaults=False)
        if all(name in own.task_index for name in names):
            return own  # reading lm-eval's 15,000 names takes ten seconds
    manager = TaskManager(include_path="." if has_folder else None)
    for name in names:
        if name not in manager.task_index:
            close = difflib.get_close_matches(name, [*PRESETS, *manager.all_tasks], n=3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"presets: {', '.join(PRESETS)}"
            raise ValueError(f"unknown task {name!r}; {hint} (tasks of your own: --task-folder)")
    return manager


def _name(item) -> str:
    return item.task_name if hasattr(item, "task_name") else item.name


def _score(results: dict[str, Any], item) -> dict[str, Any]:
    """Metrics of one task or group: lm-eval's ``acc,none`` becomes ``acc``; ``exact_match,strict-match`` is kept."""
    leaves = [item] if hasattr(item, "task_name") else item.get_all_tasks()
    shots = {results["n-shot"][_name(leaf)] for leaf in leaves}
    score: dict[str, Any] = {
        "num_fewshot": shots.pop() if len(shots) == 1 else None,
        "num_samples": sum(results["n-samples"][_name(leaf)]["effective"] for leaf in leaves),
    }
    for key, value in results["results"][_name(item)].items():
        metric, comma, filter_name = key.partition(",")
        if comma:
            number = float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None
            score[metric if filter_name == "none" else key] = number
    return score


def score_rows(scores: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Rows of the printed table: task, shots, samples, metric, value with standard error."""
    rows = []
    for task, score in scores.items():
        for key, value in score.items():
            metric, comma, filter_name = key.partition(",")
            if key in ("num_fewshot", "num_samples") or metric.endswith("_stderr") or value is None:
                continue
            error = score.get(f"{metric}_stderr{comma}{filter_name}")
            text = f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")
            rows.append([task, str(score["num_fewshot"]), str(score["num_samples"]), key, text])
    return rows
