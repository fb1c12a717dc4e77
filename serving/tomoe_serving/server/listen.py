"""The listening side: a socket bound early, and uvicorn as we want it."""

import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from tomoe_serving.server.http_protocol import protocol_with
from tomoe_serving.server.settings import ServerSettings

FLUSH_SECONDS = 5.0
"""Time that cut streams and error bodies have to reach their clients."""


class Server(uvicorn.Server):
    """uvicorn without its own signal handlers: SIGTERM is ours to drain on."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone."""
        yield


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet: the port is ours, and nobody can connect.

    Raises ``OSError`` in one line if it cannot be had.
    """
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise OSError(f"{host}:{port} cannot be bound: {error.strerror or error}") from error
    return sock


def make_server(app: ASGIApp, settings: ServerSettings) -> Server:
    """uvicorn around ``app``; it opens no socket of its own."""
    return Server(
        uvicorn.Config(
            app,
            http=protocol_with(settings.header_timeout),
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=settings.keep_alive_timeout,
            timeout_graceful_shutdown=round(FLUSH_SECONDS),
            ssl_certfile=settings.tls_cert,
            ssl_keyfile=settings.tls_key,
        )
    )
