"""The wheel in an environment without this repository: what it holds, and that its commands run."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.helpers.processes import REPOSITORY
from tests.helpers.tiny_models import save_tiny_model
from tests.helpers.wheel import build_wheel, install_without_dependencies

START_LIMIT_S = 300
KEY = "k"
PACKAGES = ("tomoe_vllm", "tomoe_training", "tomoe_serving")

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="module")
def bin_folder(wheel, tmp_path_factory) -> Path:
    """bin/ of an environment with the wheel; test_container.py installs one with the dependencies of its extras."""
    return install_without_dependencies(wheel, tmp_path_factory.mktemp("wheel") / "venv")


@pytest.fixture
def foreign_folder(tmp_path) -> Path:
    """A folder with packages called ``training`` and ``serving``, as many repositories have; importing one fails."""
    for name in ("training", "serving"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise ImportError('a foreign package: {name}')\n")
    return tmp_path


def run(*command: object, cwd: Path, **variables: str) -> str:
    """Standard output of a command that has to succeed, with a bare environment."""
    environment = {"PATH": os.environ["PATH"]} | variables
    result = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_wheel_holds_three_typed_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top_level = {name.partition("/")[0] for name in names}
    assert {name for name in top_level if not name.endswith(".dist-info")} == set(PACKAGES)
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)


def test_wheel_holds_every_file_of_the_packages(wheel):
    folders = [REPOSITORY, REPOSITORY / "training", REPOSITORY / "serving"]
    files = ((file, root) for root, name in zip(folders, PACKAGES, strict=True) for file in (root / name).rglob("*.*"))
    expected = {str(file.relative_to(root)) for file, root in files if "__pycache__" not in file.parts}
    assert expected <= set(zipfile.ZipFile(wheel).namelist())


def test_packages_are_imported_from_the_wheel(bin_folder, tmp_path):
    code = f"import {', '.join(PACKAGES)}\nfor p in ({', '.join(PACKAGES)}): print(p.__file__)"
    lines = run(bin_folder / "python", "-c", code, cwd=tmp_path).splitlines()
    assert [line.startswith(str(bin_folder.parent)) for line in lines] == [True] * 3


def test_command_prints_its_version(bin_folder, tmp_path):
    assert run(bin_folder / "tomoe", "--version", cwd=tmp_path)[0].isdigit()


def test_inspect_runs_beside_foreign_packages(bin_folder, foreign_folder):
    adapter = REPOSITORY / "adapters" / "smollm2-135m-p70"
    out = run(bin_folder / "tomoe", "inspect", adapter, cwd=foreign_folder, PYTHONPATH=".")
    assert json.loads(out.splitlines()[-1])["active_ratio_target"] == 0.7


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_plugins_are_imported_beside_foreign_packages(bin_folder, foreign_folder):
    code = "import tomoe_vllm.plugin, tomoe_serving.api.vllm_endpoint_plugin"
    run(bin_folder / "python", "-c", code, cwd=foreign_folder, PYTHONPATH=".")


@pytest.fixture(scope="module")
def served(bin_folder, tmp_path_factory):
    """Address of ``vllm serve`` with both plugins, run from an empty folder with a bare environment, and its home."""
    folder = tmp_path_factory.mktemp("served")
    save_tiny_model(folder / "checkpoint", "llama")
    empty = folder / "empty"
    empty.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "HOME": str(folder),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_PLUGINS": "tomoe,tomoe_endpoints",
        "HF_HUB_OFFLINE": "1",
    }
    # `vllm` as a module: its script's first line names the environment it was installed into.
    command = [
        bin_folder / "python", "-m", "vllm.entrypoints.cli.main", "serve", folder / "checkpoint",
        "--trust-remote-code", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager",
        "--skip-tokenizer-init", "--api-key", KEY,
    ]  # fmt: skip
    log = (folder / "log.txt").open("w")
    process = subprocess.Popen(command, cwd=empty, env=variables, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + START_LIMIT_S
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                is_late = time.monotonic() > deadline
                if process.poll() is not None or is_late:
                    pytest.fail(f"not ready (exit code {process.poll()}):\n{(folder / 'log.txt').read_text()[-3000:]}")
                time.sleep(1)
        yield f"http://127.0.0.1:{port}", folder
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.close()


def ask(url: str, body: dict | None = None, key: str = KEY) -> dict:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    return json.load(urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=120))


@pytest.mark.slow
@pytest.mark.engine
def test_wheel_serves_a_checkpoint_from_an_empty_folder(served):
    address, home = served
    body = {"prompt": [5, 17, 42, 8], "max_tokens": 6, "temperature": 0, "return_token_ids": True}
    assert len(ask(f"{address}/v1/completions", body)["choices"][0]["token_ids"]) == 6
    assert not shutil.which("g++") or list((home / ".cache" / "tomoe_vllm").rglob("*.so")), "no kernels were compiled"


@pytest.mark.slow
@pytest.mark.engine
def test_endpoint_plugin_serves_the_budget_behind_the_key(served):
    """Without what only ``tomoe serve`` knows: its queue and the measured step time."""
    address, _ = served
    budget = ask(f"{address}/v1/tomoe/budget")
    assert budget["cost"]["active_parameters"] > 0
    assert budget["capacity"]["queue_size"] is None
    assert budget["step_time"] is None
    with pytest.raises(urllib.error.HTTPError, match="401"):
        ask(f"{address}/v1/tomoe/budget", key="another")
