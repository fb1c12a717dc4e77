"""vLLM's own app with the experts attached, as a process: ``python -m tests.helpers.expert_server MODEL --port N``.

What ``tomoe serve`` does beside this (admission, drain, settings) has its own tests.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.helpers.processes import environment

START_LIMIT_S = 1200
OFF = "--without-statistics"


async def serve(arguments: list[str]) -> None:
    """Run until SIGTERM."""
    import uvicorn
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.api_server.entry import build_async_engine_client
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from serving.experts import ENGINE_ARGUMENTS, attach_experts

    flags = [argument for argument in arguments if argument != OFF]
    if OFF not in arguments:
        for name, value in ENGINE_ARGUMENTS.items():
            flags += [f"--{name.replace('_', '-')}", str(value)]
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(flags)
    async with build_async_engine_client(args) as engine:
        tasks = await engine.get_supported_tasks()
        app = build_app(args, tasks, engine.model_config)
        await init_app_state(engine, app.state, args, tasks)
        attach_experts(app, engine, None)
        await uvicorn.Server(uvicorn.Config(app, host=args.host, port=args.port, log_level="warning")).serve()


@contextmanager
def running(folder: Path, *flags: str) -> Iterator[str]:
    """The address of a server of the checkpoint in ``folder``; its log is printed where it does not start."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [
        sys.executable, "-m", "tests.helpers.expert_server", "--model", folder, "--host", "127.0.0.1",
        "--port", port, "--dtype", "float32", "--enforce-eager", *flags,
    ]  # fmt: skip
    variables = environment(
        VLLM_CPU_KVCACHE_SPACE="1", VLLM_CPU_NUM_OF_RESERVED_CPU="0", VLLM_CPU_OMP_THREADS_BIND="nobind"
    )
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            list(map(str, command)), env=variables, stdout=log, stderr=log, start_new_session=True
        )
        try:
            _wait(process, address, log)
            yield address
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait(process: subprocess.Popen, address: str, log) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while True:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5)
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            if process.poll() is not None or time.monotonic() > deadline:
                log.seek(0)
                raise RuntimeError(f"not ready (exit code {process.poll()}):\n{log.read()[-4000:]}") from None
            time.sleep(0.5)


if __name__ == "__main__":
    import asyncio

    asyncio.run(serve(sys.argv[1:]))
