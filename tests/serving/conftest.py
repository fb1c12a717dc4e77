"""Running servers, one per model, for tests that leave a server as it was; tests that stop one start their own."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.helpers.servers import RunningServer

KEY = "sk-test-a-key-of-some-length"
LIMITS = ("--queue-size", "8", "--header-timeout", "2", "--body-timeout", "2", "--max-body-bytes", "1000000")
TOOLS = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")


@dataclass(frozen=True, kw_only=True)
class Live:
    """A running server and prompts that suit its model."""

    server: "RunningServer" = field(repr=False)
    checkpoint: Path
    prompt: str
    """At temperature 0 the model continues it by at least 24 tokens."""
    prompts: list[str]
    """Eight different prompts."""
    choices: tuple[str, str]
    dense_kv_bytes: int
    """Bytes of one token's keys and values in float32 without pruning, counted by hand."""

    @property
    def model(self) -> str:
        """The name under which the model is served."""
        return self.checkpoint.name

    @property
    def base_url(self) -> str:
        """``base_url`` for an OpenAI client."""
        return f"{self.server.url}/v1"


@pytest.fixture(scope="session")
def served_model(tmp_path_factory):
    """A tiny ToMoE checkpoint with tokenizer and chat template."""
    from tests.helpers.servers import save_served_model

    return save_served_model(tmp_path_factory.mktemp("served") / "tiny-tomoe")


@pytest.fixture(scope="session")
def server(served_model, tmp_path_factory):
    """A running server with a key and a small queue."""
    from tests.helpers.servers import run_server

    log = tmp_path_factory.mktemp("server") / "log"
    with run_server(served_model, log, *LIMITS, engine=TOOLS, key=KEY) as running:
        yield running


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Live:
    """SmolLM2-135M at p = 0.7 with the same flags: a real tokenizer and chat template."""
    from tests.helpers.demo_model import save_demo_base, save_demo_checkpoint
    from tests.helpers.servers import run_server

    folder = tmp_path_factory.mktemp("demo")
    checkpoint = save_demo_checkpoint(folder / "smollm2-tomoe", save_demo_base(folder / "smollm2"))
    flags = (*TOOLS, "--max-model-len", "1024")
    with run_server(checkpoint, folder / "log", *LIMITS, engine=flags, key=KEY) as running:
        yield Live(
            server=running,
            checkpoint=checkpoint,
            prompt="Once upon a time there was a king who",
            prompts=["Water boils at", "In 1969 the first", "Dear Sir or Madam,", "The three primary colours are", "A",
                     "Q: Who wrote Hamlet?\nA:", "To make an omelette, first", "def fibonacci(n):\n    "],
            choices=("yes", "no"),
            dense_kv_bytes=2 * 3 * 64 * 30 * 4,  # K and V, 3 heads of 64, 30 layers, 4 bytes
        )  # fmt: skip


@pytest.fixture(scope="session", params=["tiny", pytest.param("demo", marks=pytest.mark.slow)])
def live(request) -> Live:
    """Each of the models; each server is started once."""
    if request.param == "demo":
        return request.getfixturevalue("demo")
    return Live(
        server=request.getfixturevalue("server"),
        checkpoint=request.getfixturevalue("served_model"),
        prompt="w1 w2 w3",
        prompts=[f"w{index}" for index in range(8)],
        choices=("w4", "w5"),
        dense_kv_bytes=2 * 2 * 32 * 3 * 4,  # K and V, 2 heads of 32, 3 layers, 4 bytes
    )
