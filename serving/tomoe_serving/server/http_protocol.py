"""uvicorn's HTTP/1.1 protocol with a timeout and a size limit for request headers.

uvicorn has neither: a client that sends one byte now and then (slow loris) holds its connection for ever. Both can only
be checked where bytes arrive, hence the subclass. The timeout of the body is in ``middleware/body.py``.
"""

import asyncio

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from tomoe_serving.middleware.errors import error_body

MAX_HEADER_BYTES = 64 << 10
"""Far above what clients send; nginx's default is half of it (4 buffers of 8 KiB)."""


class DeadlineProtocol(HttpToolsProtocol):
    """Closes a connection with 408 if headers are late, with 431 if they are too large."""

    header_timeout = 10.0
    _timer: asyncio.TimerHandle | None = None
    _is_in_headers = True
    _header_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._is_in_headers:
            self._header_bytes += len(data)
            if self._timer is None:
                self._start_timer()
        super().data_received(data)
        if self._is_in_headers and self._header_bytes > MAX_HEADER_BYTES:
            self._refuse(431, f"the headers are larger than {MAX_HEADER_BYTES} bytes")

    def on_headers_complete(self) -> None:
        self._is_in_headers = False
        self._header_bytes = 0
        self._stop_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._is_in_headers = True
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn for bytes that are not HTTP."""
        self._refuse(400, msg)

    def _start_timer(self) -> None:
        self._timer = self.loop.call_later(self.header_timeout, self._headers_are_late)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _headers_are_late(self) -> None:
        self._timer = None
        if self.cycle is not None and not self.cycle.response_complete:
            self._start_timer()  # pipelined: the previous response is still being sent
        elif self._header_bytes:
            self._refuse(408, f"the headers did not arrive within {self.header_timeout:g} s")
        else:
            self.transport.close()  # an idle connection needs no response

    def _refuse(self, status: int, message: str) -> None:
        if self.transport.is_closing():
            return
        body = error_body(status, message)
        head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()


def protocol_with(header_timeout: float) -> type[DeadlineProtocol]:
    """The protocol class for ``uvicorn.Config(http=...)``; ``header_timeout`` in seconds."""
    return type("DeadlineProtocol", (DeadlineProtocol,), {"header_timeout": header_timeout})
