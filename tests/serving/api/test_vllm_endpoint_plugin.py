"""The routes under bare ``vllm serve``: found as an entry point, guarded by vLLM's own key."""

import contextlib
import subprocess
import sys
import time
import tomllib

import httpx
import pytest

from tests.helpers.processes import REPOSITORY, environment
from tests.helpers.servers import START_LIMIT_S, free_port

GROUP = "vllm.endpoint_plugins"


def _entry_points() -> dict[str, str]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["entry-points"][GROUP]


def test_the_entry_point_is_a_plugin_that_serves_text_generation():
    from fastapi import FastAPI
    from tomoe_serving.api.vllm_endpoint_plugin import ToMoEEndpoints

    assert _entry_points() == {ToMoEEndpoints.name: f"{ToMoEEndpoints.__module__}:{ToMoEEndpoints.__name__}"}
    app = FastAPI()
    ToMoEEndpoints().attach_router(app)
    assert "/v1/tomoe/budget" in app.openapi()["paths"]
    assert ToMoEEndpoints.required_tasks == ("generate",)


@pytest.mark.engine
@pytest.mark.slow
def test_bare_vllm_serves_the_budget(served_model, tmp_path):
    metadata = tmp_path / "site" / "tomoe_endpoints_of_this_tree-0.dist-info"  # the installed one may be another tree's
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: tomoe-endpoints-of-this-tree\nVersion: 0\n")
    lines = [f"{name} = {target}" for name, target in _entry_points().items()]
    (metadata / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines]))
    variables = {
        "PYTHONPATH": f"{REPOSITORY}:{tmp_path / 'site'}",
        "VLLM_PLUGINS": "tomoe,tomoe_endpoints",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    }
    port = free_port()
    command = ["-m", "vllm.entrypoints.cli.main", "serve", str(served_model), "--port", str(port), "--api-key", "k"]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--host", "127.0.0.1"]
    log = tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, *command], env=environment(**variables), stdout=out, stderr=out, cwd=REPOSITORY
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_LIMIT_S
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                    break
            time.sleep(0.5)
        assert process.poll() is None, log.read_text()[-3000:]
        assert httpx.get(f"{url}/v1/tomoe/budget", timeout=60).status_code == 401
        budget = httpx.get(f"{url}/v1/tomoe/budget", headers={"Authorization": "Bearer k"}, timeout=60).json()
        assert budget["cost"]["active_parameters"] > 0
        assert budget["capacity"]["queue_size"] is None
        assert budget["step_time"] is None
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        process.kill()
        process.wait()
