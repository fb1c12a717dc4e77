"""``vllm bench serve`` against a server with an API key."""

import json

import pytest

from tests.helpers.processes import environment, python
from tests.serving.conftest import KEY

pytestmark = pytest.mark.engine

NUM_PROMPTS = 8
NUM_TOKENS = 4


@pytest.mark.parametrize(
    ("live", "backend", "endpoint"),
    [
        ("tiny", "openai", "/v1/completions"),
        pytest.param("demo", "openai-chat", "/v1/chat/completions", marks=pytest.mark.slow),
    ],
    indirect=["live"],
)
def test_every_request_is_completed(live, tmp_path, backend, endpoint):
    command = ["-m", "vllm.entrypoints.cli.main", "bench", "serve", "--base-url", live.server.url]
    command += ["--backend", backend, "--endpoint", endpoint, "--model", live.checkpoint]
    command += ["--dataset-name", "random", "--random-input-len", 16, "--random-output-len", NUM_TOKENS]
    command += ["--num-prompts", NUM_PROMPTS, "--ignore-eos"]
    command += ["--save-result", "--result-dir", tmp_path, "--result-filename", "result.json"]
    run = python(*command, env=environment(OPENAI_API_KEY=KEY), timeout=900)
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (NUM_PROMPTS, 0)
    assert result["total_output_tokens"] == NUM_PROMPTS * NUM_TOKENS
