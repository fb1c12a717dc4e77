import socket

import pytest
from tomoe_serving.server.listen import bind


def test_port_in_use_is_refused():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OSError, match="cannot be bound"):
            bind("127.0.0.1", taken.getsockname()[1])


def test_bound_port_does_not_accept_connections():
    with bind("127.0.0.1", 0) as sock, pytest.raises(ConnectionRefusedError):
        socket.create_connection(sock.getsockname(), timeout=5)
