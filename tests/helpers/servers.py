"""A ``tomoe serve`` process with a tiny checkpoint, and clients for it."""

import contextlib
import json
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil

from tests.helpers.dense_models import word_tokenizer
from tests.helpers.processes import REPOSITORY, environment
from tests.helpers.tiny_models import VOCAB_SIZE, save_tiny_model

START_LIMIT_S = 600
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
MAX_POSITIONS = 8192
"""Long enough for streams to be still running when a test acts on them."""


def save_served_model(folder: Path) -> Path:
    """A tiny ToMoE checkpoint with tokenizer and chat template; its words are w0, w1, ..."""
    save_tiny_model(folder, "llama", vocab_size=VOCAB_SIZE, max_position_embeddings=MAX_POSITIONS)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


class RunningServer:
    """A server process, its address and its log."""

    def __init__(
        self, process: subprocess.Popen, port: int, log: Path, key: str | None, trust: ssl.SSLContext | None = None
    ) -> None:
        self.process = process
        self.port = port
        self.url = f"{'https' if trust else 'http'}://127.0.0.1:{port}"
        self.verify = trust or True
        self.log = log
        self.key = key
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}

    def client(self, **options) -> httpx.Client:
        """A client with the key and a long timeout; over TLS it uses the test's context."""
        options = {"timeout": 120, "verify": self.verify} | options
        return httpx.Client(base_url=self.url, headers=self.headers, **options)

    def budget(self) -> dict:
        """``GET /v1/tomoe/budget``."""
        with self.client() as client:
            return client.get("/v1/tomoe/budget").raise_for_status().json()

    def log_lines(self, logger: str) -> list[dict]:
        """JSON log lines of one logger so far."""
        lines = []
        for line in self.log.read_text().splitlines():
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                if isinstance(entry, dict) and entry.get("logger") == logger:
                    lines.append(entry)
        return lines

    def engine_processes(self) -> list[psutil.Process]:
        """The engine and its workers."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def engine_core(self) -> psutil.Process:
        """The process of the engine core."""
        children = [p for p in psutil.Process(self.process.pid).children() if "EngineCore" in " ".join(p.cmdline())]
        return children[0]


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@contextlib.contextmanager
def run_server(
    checkpoint: Path,
    log: Path,
    *flags: str,
    engine: tuple[str, ...] = (),
    key: str | None = None,
    trust: ssl.SSLContext | None = None,
    **variables: str,
) -> Iterator[RunningServer]:
    """Run ``tomoe serve`` until the block ends. Fails with the end of its log if it does not become ready.

    Args:
        trust: TLS context of the clients, if ``flags`` set a certificate.
    """
    port = free_port()
    command = [sys.executable, "-m", "tomoe_vllm.cli", "serve", str(checkpoint), "--port", str(port), *flags]
    command += ["--", "--max-model-len", "256", "--max-num-seqs", "16", *engine]
    settings = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1"} | variables
    if key:
        settings["TOMOE_API_KEYS"] = key
    with log.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=environment(**settings), cwd=REPOSITORY
        )
    server = RunningServer(process, port, log, key, trust)
    children: list[psutil.Process] = []
    try:
        wait_until_ready(server)
        children = server.engine_processes()
        yield server
    finally:
        if process.poll() is None:
            children = server.engine_processes()
            process.send_signal(signal.SIGKILL)
        process.wait(60)
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()


def wait_until_ready(server: RunningServer) -> None:
    """Return when ``/ready`` is 200; fail if the process ends first."""
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise AssertionError(f"the server ended: {server.log.read_text()[-3000:]}")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{server.url}/ready", timeout=5, verify=server.verify).status_code == 200:
                return
        time.sleep(0.5)
    raise AssertionError(f"the server was not ready: {server.log.read_text()[-3000:]}")


def eventually(condition, *, seconds: float = 60.0, what: str = "condition") -> None:
    """Wait until ``condition()`` holds; fail otherwise."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} was not true within {seconds} s")
        time.sleep(0.1)


def in_threads(count: int, function) -> list:
    """``[function(0), function(1), ...]`` in concurrent threads; raises the first exception."""
    results: list = [None] * count

    def run(index: int) -> None:
        try:
            results[index] = function(index)
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results
