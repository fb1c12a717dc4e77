"""The wheel, alone in a clean environment, serves a checkpoint from an empty folder."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.helpers.tiny_models import save_tiny_model
from tests.helpers.wheel import build_wheel, install_wheel

START_LIMIT_S = 300

pytestmark = [pytest.mark.slow, pytest.mark.engine]


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """bin/ of a new virtual environment with only the wheel and its `cpu` extra (about two minutes)."""
    if shutil.which("nvidia-smi"):
        pytest.skip("installs the CPU build of vLLM")
    folder = tmp_path_factory.mktemp("wheel")
    return install_wheel(build_wheel(folder / "dist"), folder / "venv")


@pytest.fixture(scope="module")
def served(environment, tmp_path_factory):
    """Address of ``vllm serve`` run from an empty folder with a bare environment."""
    folder = tmp_path_factory.mktemp("served")
    save_tiny_model(folder / "checkpoint", "llama")
    empty = folder / "empty"
    empty.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = {
        "PATH": f"{environment}:{os.environ['PATH']}",
        "HOME": str(folder),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [
        environment / "vllm", "serve", folder / "checkpoint", "--trust-remote-code", "--host", "127.0.0.1",
        "--port", str(port), "--dtype", "float32", "--enforce-eager", "--skip-tokenizer-init",
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
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.close()


def test_wheel_has_no_source_tree_behind_it(environment, tmp_path):
    code = "import serving, tomoe_vllm, training\nfor p in (serving, tomoe_vllm, training):\n    print(p.__file__)"
    result = subprocess.run(
        [environment / "python", "-c", code], cwd=tmp_path, env={"PATH": ""}, capture_output=True, text=True, check=True
    )
    assert all("site-packages" in line for line in result.stdout.splitlines())


def test_wheel_compiles_its_kernels(environment, tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    code = "from tomoe_vllm.kernels import build; print(build.load(), build.build())"
    result = subprocess.run(
        [environment / "python", "-c", code],
        cwd=tmp_path,
        env={"PATH": os.environ["PATH"], "TOMOE_CACHE_ROOT": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.startswith(f"True {tmp_path}"), result.stderr


def test_command_of_the_wheel_prints_its_version(environment, tmp_path):
    result = subprocess.run(
        [environment / "tomoe", "--version"], cwd=tmp_path, env={"PATH": ""}, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip()[0].isdigit()


def test_wheel_serves_a_checkpoint_from_an_empty_folder(served):
    body = json.dumps({"prompt": [5, 17, 42, 8], "max_tokens": 6, "temperature": 0, "return_token_ids": True})
    request = urllib.request.Request(
        f"{served}/v1/completions", data=body.encode(), headers={"Content-Type": "application/json"}
    )
    reply = json.load(urllib.request.urlopen(request, timeout=120))
    assert len(reply["choices"][0]["token_ids"]) == 6
