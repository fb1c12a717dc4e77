"""How a server ends: after SIGTERM, and after the death of its engine. Each test starts its own server."""

import contextlib
import json
import signal
import threading
import time

import httpx
import pytest

from tests.helpers.servers import RunningServer, eventually, run_server

pytestmark = [pytest.mark.engine, pytest.mark.slow]

LONG = ("--max-model-len", "8192")
BODY = {"model": "tiny-tomoe", "max_tokens": 8000, "temperature": 0, "ignore_eos": True}


class Stream(threading.Thread):
    """A streamed completion in a thread; ``events`` holds the events received so far."""

    def __init__(self, server: RunningServer, prompt: str, **fields) -> None:
        super().__init__(daemon=True)
        self.server, self.body = server, BODY | {"prompt": prompt, "stream": True} | fields
        self.events: list[str] = []
        self.start()

    def run(self) -> None:
        with (
            self.server.client(timeout=300) as client,
            contextlib.suppress(httpx.TransportError),
            client.stream("POST", "/v1/completions", json=self.body) as response,
        ):
            self.events.extend(line[6:] for line in response.iter_lines() if line.startswith("data: "))

    @property
    def finish_reasons(self) -> list[str]:
        data = [json.loads(event) for event in self.events if event != "[DONE]"]
        return [c["finish_reason"] for d in data for c in d.get("choices", []) if c["finish_reason"]]


def _collect(server: RunningServer, prompt: str, into: list[httpx.Response]) -> threading.Thread:
    def post() -> None:
        with server.client(timeout=300) as client:
            into.append(client.post("/v1/completions", json=BODY | {"prompt": prompt}))

    thread = threading.Thread(target=post, daemon=True)
    thread.start()
    return thread


def test_sigterm_drains_and_the_second_one_aborts(served_model, tmp_path):
    with run_server(served_model, tmp_path / "log", "--drain-timeout", "500", "--no-measure", engine=LONG) as server:
        short = Stream(server, "w5", max_tokens=1500)
        long = [Stream(server, f"w{i}") for i in range(4)]
        eventually(lambda: all(stream.events for stream in [short, *long]), what="a first event on every stream")
        server.process.send_signal(signal.SIGTERM)
        eventually(lambda: httpx.get(f"{server.url}/ready").status_code == 503, what="/ready off")
        assert httpx.get(f"{server.url}/health").status_code == 200
        with server.client() as client:
            refused = client.post("/v1/completions", json=BODY | {"prompt": "w1"})
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "ServiceUnavailableError"
        short.join(300)
        assert short.finish_reasons == ["length"], "an open request was not completed"
        server.process.send_signal(signal.SIGTERM)  # the second one aborts
        for stream in long:
            stream.join(120)
            assert stream.finish_reasons == ["abort"]
            assert stream.events[-1] == "[DONE]"
        assert server.process.wait(120) == 0


def test_death_of_the_engine_ends_requests_and_the_process(served_model, tmp_path):
    with run_server(served_model, tmp_path / "log", "--no-measure", engine=LONG) as server:
        streams = [Stream(server, f"w{i}") for i in range(4)]
        responses: list[httpx.Response] = []
        thread = _collect(server, "w9", responses)
        eventually(lambda: all(stream.events for stream in streams), what="a first event on every stream")
        eventually(lambda: server.budget()["in_use"]["running"] == 5, what="five running")
        server.engine_core().send_signal(signal.SIGKILL)
        start = time.monotonic()
        statuses = []
        while server.process.poll() is None and time.monotonic() - start < 120:
            with contextlib.suppress(httpx.TransportError):
                statuses.append(httpx.get(f"{server.url}/ready", timeout=30).status_code)
            time.sleep(0.02)
        assert server.process.wait(120) == 1
        assert statuses.count(200) <= 2, "ready after the engine had died"
        for stream in streams:
            stream.join(60)
            assert "error" in json.loads(stream.events[-2])
            assert stream.events[-1] == "[DONE]"
        thread.join(60)
        assert responses[0].status_code == 500
        assert responses[0].json()["error"]["code"] == 500
