"""Request bodies: limits of size and time, and validation of JSON.

vLLM parses bodies with Python's json, which accepts NaN, Infinity and lone surrogates; they cause a 500 later. msgspec
follows RFC 8259 strictly and takes microseconds.
"""

import asyncio
import math
from typing import Any

import msgspec
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tomoe_serving.middleware.errors import RequestRefusedError, send_error

DISCARD_BYTES = 256 << 20
"""How much of a body that is too large is read and discarded, so that the client can read its 413."""

DECODED_BODY = "tomoe.body"
"""Key in the ASGI scope of the decoded JSON, for later layers."""

MAX_DEPTH = 100
"""Deepest nesting of a JSON body. JSON schemas of real tools nest less than 20 levels."""


class ClientGoneError(Exception):
    """The client closed the connection before its body was read."""


class BodyMiddleware:
    """Reads and checks the whole body before the app is called.

    Args:
        max_bytes: larger bodies get 413, chunked ones as well.
        timeout: seconds for the whole body; after that 408.
        max_tokens: context of the model; a request with a larger token limit gets 400.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, timeout: float, max_tokens: int) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.timeout = timeout
        self.max_tokens = max_tokens

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH", "DELETE"):
            return await self.app(scope, receive, send)
        try:
            body = await self._read(receive)
            if Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower() == "application/json":
                scope = {**scope, DECODED_BODY: self._decode(body)}
        except ClientGoneError:
            return
        except RequestRefusedError as error:
            return await send_error(send, error)
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self.app(scope, replay, send)

    async def _read(self, receive: Receive) -> bytes:
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGoneError
                    part = message.get("body", b"")
                    size += len(part)
                    if size <= self.max_bytes:
                        parts.append(part)
                    elif size > DISCARD_BYTES:
                        break
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            message_ = f"the body did not arrive within {self.timeout:g} s"
            raise RequestRefusedError(408, message_, headers={"connection": "close"}) from None
        if size > self.max_bytes:
            message_ = f"the body is larger than {self.max_bytes} bytes (--max-body-bytes)"
            raise RequestRefusedError(413, message_, headers={"connection": "close"})
        return b"".join(parts)

    def _decode(self, body: bytes) -> Any:
        try:
            body.decode()  # msgspec would report invalid UTF-8 as truncated JSON
            value = msgspec.json.decode(body)
        except UnicodeDecodeError as error:
            raise RequestRefusedError(400, f"the body is not valid UTF-8 at byte {error.start}") from None
        except RecursionError:
            raise RequestRefusedError(400, f"the body is nested deeper than {MAX_DEPTH} levels") from None
        except ValueError as error:
            raise RequestRefusedError(400, f"the body is not valid JSON: {error}") from None
        if _depth_exceeds(value, MAX_DEPTH):
            raise RequestRefusedError(400, f"the body is nested deeper than {MAX_DEPTH} levels")
        if isinstance(value, dict):
            self._check_limits(value)
        return value

    def _check_limits(self, value: dict[str, Any]) -> None:
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            limit = value.get(name)
            if isinstance(limit, int | float) and (limit > self.max_tokens or not math.isfinite(limit)):
                message = f"{name} is {limit:.6g}, but the model's context holds {self.max_tokens} tokens"
                raise RequestRefusedError(400, message, param=name)


def _depth_exceeds(value: Any, limit: int) -> bool:
    """Whether lists and objects are nested deeper than ``limit``. Goes level by level, without recursion."""
    level = [value]
    for _ in range(limit):
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item if isinstance(item, list) else ())
            if isinstance(child, dict | list)
        ]
        if not level:
            return False
    return True
