"""The Dockerfile's steps without Docker: another user, an empty environment, a tree that it cannot write to.

What a container adds (its image, its namespaces, a GPU) is not tested: no Docker engine runs here.
"""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.deploy.test_manifests import instructions
from tests.helpers.tiny_models import save_tiny_model
from tests.helpers.wheel import build_wheel, install_wheel

START_LIMIT_S = 1200
USER = 10001

pytestmark = [
    pytest.mark.slow,
    pytest.mark.engine,
    pytest.mark.skipif(os.getuid() != 0, reason="becomes another user, so it must start as root"),
    pytest.mark.skipif(find_spec("tomoe_serving.server.lifecycle") is None, reason="tomoe serve is not in this tree"),
    pytest.mark.skipif(bool(shutil.which("nvidia-smi")), reason="installs the CPU build of vLLM"),
]


def system_python() -> str:
    """A Python with venv that the other user may run; skips the test where there is none."""
    for name in ("python3.13", "python3.12", "python3.11", "python3"):
        for folder in ("/usr/local/bin", "/usr/bin"):
            python = f"{folder}/{name}"
            check = "import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 14))"
            if Path(python).exists() and not subprocess.run([python, "-c", check], user=USER, group=USER).returncode:
                return python
    pytest.skip("no system Python from 3.11 to 3.13 with venv")


@pytest.fixture(scope="module")
def container():
    """The folders of an image and its volumes: ``image`` (root's), ``model`` (root's), ``cache`` (the user's)."""
    folder = Path(tempfile.mkdtemp(prefix="tomoe-container-"))  # pytest's own folders are closed to other users
    try:
        folder.chmod(0o755)
        python = system_python()
        bin_folder = install_wheel(build_wheel(folder / "dist"), folder / "image", extras="cpu,serve", python=python)
        save_tiny_model(folder / "model", "llama")
        (folder / "cache").mkdir()
        for mounted in ("model", "image"):
            subprocess.run(["chmod", "-R", "go+rX,go-w", folder / mounted], check=True)
        os.chown(folder / "cache", USER, USER)
        yield folder, bin_folder
    finally:
        shutil.rmtree(folder)


def variables(folder: Path) -> dict[str, str]:
    """The Dockerfile's environment and nothing else; its /cache is the folder's."""
    found = dict(word.split("=", 1) for word in shlex.split(dict(instructions())["ENV"]))
    found = {name: value.replace("/cache", str(folder / "cache"), 1) for name, value in found.items()}
    return found | {
        "PATH": f"{folder}/image/bin:/usr/local/bin:/usr/bin:/bin", "TMPDIR": str(folder / "cache"),
        "TOMOE_HOST": "127.0.0.1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }  # fmt: skip


@pytest.fixture(scope="module")
def served(container):
    """Address of the Dockerfile's entry point, run as its user."""
    folder, bin_folder = container
    entry = json.loads(dict(instructions())["ENTRYPOINT"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [bin_folder / entry[0], *entry[1:], folder / "model", "--port", str(port), "--no-measure"]
    command += ["--", "--skip-tokenizer-init", "--max-model-len", "256", "--max-num-seqs", "4"]
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            list(map(str, command)), cwd=folder / "cache", env=variables(folder), stdout=log, stderr=log,
            start_new_session=True, user=USER, group=USER, extra_groups=[],
        )  # fmt: skip
        try:
            deadline = time.monotonic() + START_LIMIT_S
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                except (urllib.error.URLError, ConnectionError, TimeoutError):
                    if process.poll() is not None or time.monotonic() > deadline:
                        pytest.fail(f"exit code {process.poll()}:\n{(folder / 'log.txt').read_text()[-3000:]}")
                    time.sleep(1)
            yield f"http://127.0.0.1:{port}", process.pid
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(timeout=90)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def test_user_of_the_image_serves_a_model(served):
    address, pid = served
    assert f"Uid:\t{USER}\t" in Path(f"/proc/{pid}/status").read_text()
    body = json.dumps({"prompt": [5, 17, 42, 8], "max_tokens": 6, "temperature": 0, "return_token_ids": True})
    request = urllib.request.Request(f"{address}/v1/completions", body.encode(), {"Content-Type": "application/json"})
    reply = json.load(urllib.request.urlopen(request, timeout=120))
    assert len(reply["choices"][0]["token_ids"]) == 6
    assert b"ToMoE playground" in urllib.request.urlopen(f"{address}/", timeout=30).read()
    assert urllib.request.urlopen(f"{address}/static/playground/main.js", timeout=30).status == 200
    report = json.load(urllib.request.urlopen(f"{address}/v1/tomoe/experts", timeout=60))
    assert report["num_tokens"] >= 4 + 5


def test_nothing_outside_of_the_volumes_can_be_written(container, served):
    folder, bin_folder = container
    attempt = (
        "import pathlib, sys\n"
        "for place in sys.argv[1:]:\n"
        "    try:\n        (pathlib.Path(place) / 'x').touch()\n"
        "    except OSError:\n        continue\n"
        "    print(place)\n"
    )
    places = [folder / "image", folder / "image" / "bin", folder / "model", folder, folder / "cache"]
    result = subprocess.run(
        [bin_folder / "python", "-c", attempt, *map(str, places)], env={}, user=USER, group=USER, extra_groups=[],
        capture_output=True, text=True,
    )  # fmt: skip
    assert result.stdout.split() == [str(folder / "cache")], result.stderr
