"""Fixtures of all tests: one thread, no model hub, caches in a temporary folder."""

import gc
import os
import shutil
import tempfile
from pathlib import Path

import pytest

SERVED = "tests/serving/live/"
"""Tests that share the servers of tests/serving/conftest.py."""


def pytest_configure(config):
    """Set what libraries read when they are imported, before any test module imports them."""
    config.hf_home = tempfile.mkdtemp(prefix="tomoe-tests-hf-")
    os.environ |= {
        "HF_HOME": config.hf_home,
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }


def pytest_collection_modifyitems(items):
    """Run tests that start an engine after all others, those of the shared servers first among them.

    One process takes all of the latter, so there must be work left for the other.
    """
    items.sort(key=lambda item: (item.get_closest_marker("engine") is not None, not item.nodeid.startswith(SERVED)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """``pytest -n 2``: whole files go to processes, in the order above; files that share a server go to one."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return SERVED if nodeid.startswith(SERVED) else super()._split_scope(nodeid)

    config.option.loadscopereorder = False
    return Scheduling(config, log)


def pytest_collection_finish():
    """Exempt what was imported from garbage collection: vLLM runs full collections often."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config):
    gc.unfreeze()  # otherwise extension modules report leaks at exit
    shutil.rmtree(config.hf_home, ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """One thread: faster for small tensors, and the order of sums is the same on every machine."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory):
    """``dense_folder(family, **fields)``: a saved tiny dense model with a tokenizer, made once per session."""
    from tests.helpers.dense_models import save_dense_model

    made: dict[str, Path] = {}

    def get(family: str = "llama", **fields) -> Path:
        key = f"{family}-{sorted(fields.items())}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("dense") / family
            save_dense_model(made[key], family, **fields)
        return made[key]

    return get


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """A .txt file of 6,000 tokens for the tokenizer of ``dense_folder``."""
    from tests.helpers.dense_models import random_text

    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(random_text(6_000))
    return file


@pytest.fixture(scope="session")
def adapter_folder(dense_folder, tmp_path_factory):
    """``adapter_folder(family, **settings)``: an untrained adapter of the dense model, made once per session."""
    from tests.helpers.students import save_untrained_adapter

    made: dict[str, Path] = {}

    def get(family: str = "llama", **settings) -> Path:
        key = f"{family}-{sorted(settings.items())}"
        if key not in made:
            made[key] = tmp_path_factory.mktemp("adapter") / family
            save_untrained_adapter(made[key], dense_folder(family), **settings)
        return made[key]

    return get


@pytest.fixture
def gpu():
    """``gpu:0``, a device with CUDA's rules on the CPU: see tests/helpers/pretended_gpu."""
    from tests.helpers.pretended_gpu import pretended_gpu

    with pretended_gpu() as device:
        yield device


@pytest.fixture
def run_cli(monkeypatch, capfd):
    """``run_cli("inspect", folder)``: the real command line in this process -> (exit code, stdout, stderr)."""
    from tomoe_vllm import cli

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["tomoe", *map(str, arguments)])
        capfd.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as exit_:
            code = exit_.code or 0
        out, err = capfd.readouterr()
        return code, out, err

    return run
