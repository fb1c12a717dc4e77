"""The listening socket, bound before the engine starts, and uvicorn's configuration."""

import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from tomoe_serving.server.http_protocol import protocol_with
from tomoe_serving.server.settings import ServerSettings

FLUSH_SECONDS = 5.0
"""Time for last chunks and error bodies to reach their clients."""


class Server(uvicorn.Server):
    """uvicorn without its signal handlers; :class:`Lifecycle` handles signals."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install no signal handlers."""
        yield


def bind(host: str, port: int) -> socket.socket:
    """A socket that is bound but does not listen yet: the port is reserved, and no client can connect.

    Raises ``OSError`` with a message of one line.
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
    """uvicorn for ``app``. It is given a bound socket when it starts."""
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
