"""Request ids and the access log."""

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("tomoe_serving.access")

_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class RequestLogMiddleware:
    """Outermost layer: gives every request an id and writes one log line for it.

    A client's X-Request-Id is kept if it has at most 128 letters, digits, dots, dashes and underscores, otherwise it
    is replaced. vLLM uses the id as well, and the response returns it. The log line holds method, path, status,
    durations and sizes, and the request body only with ``log_prompts``.
    """

    def __init__(self, app: ASGIApp, *, log_prompts: bool = False) -> None:
        self.app = app
        self.log_prompts = log_prompts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        start = time.perf_counter()
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        headers = [(name, value) for name, value in scope["headers"] if name != b"x-request-id"]
        scope = {**scope, "headers": [*headers, (b"x-request-id", request_id.encode())]}
        facts: dict[str, object] = {"status": 0, "bytes": 0}
        body = bytearray()

        async def receive_and_copy() -> Message:
            message = await receive()
            body.extend(message.get("body", b""))
            return message

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                facts["status"] = message["status"]
                facts["first_byte_ms"] = _since(start)
                MutableHeaders(scope=message)["x-request-id"] = request_id
            elif message["type"] == "http.response.body":
                facts["bytes"] += len(message.get("body", b""))  # type: ignore[operator]
            await send(message)

        try:
            await self.app(scope, receive_and_copy if self.log_prompts else receive, send_with_id)
        finally:
            client = scope.get("client")
            facts |= {
                "request_id": request_id,
                "method": scope["method"],
                "path": scope["path"],
                "client": client[0] if client else None,
                "duration_ms": _since(start),
            }
            if self.log_prompts and body:
                facts["body"] = body.decode(errors="replace")
            logger.info("%s %s %s", scope["method"], scope["path"], facts["status"], extra=facts)


def _since(start: float) -> float:
    return round((time.perf_counter() - start) * 1000, 1)
