"""One server for all tests that leave it as they found it; those that break one start their own."""

import pytest

KEY = "sk-test-a-key-of-some-length"


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
    limits = ("--queue-size", "8", "--header-timeout", "2", "--body-timeout", "2", "--max-body-bytes", "1000000")
    tools = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")
    with run_server(served_model, log, *limits, engine=tools, key=KEY) as running:
        yield running
