"""Adds ``active_parameters_per_token`` to the ``usage`` of responses, streamed or not.

Opt-in, because OpenAI's schema does not have the field: ``--report-active-parameters`` for all requests, or the header
``X-ToMoE-Usage: active-parameters`` for one. It works on the response bytes, so it covers all of vLLM's routes.
"""

import json
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER, VALUE = "x-tomoe-usage", "active-parameters"
FIELD = "active_parameters_per_token"


class UsageMiddleware:
    """Adds :data:`FIELD` to every usage object of a response.

    Args:
        active_parameters: value of the field.
        always: for every request, not only for those with the header.
    """

    def __init__(self, app: ASGIApp, *, active_parameters: int, always: bool) -> None:
        self.app = app
        self.active_parameters = active_parameters
        self.always = always

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_wanted = scope["type"] == "http" and scope["method"] == "POST"
        is_wanted = is_wanted and (self.always or Headers(scope=scope).get(HEADER, "") == VALUE)
        if not is_wanted:
            return await self.app(scope, receive, send)
        start: Message = {}
        held = bytearray()
        is_stream = False

        async def send_with_field(message: Message) -> None:
            nonlocal start, held, is_stream
            if message["type"] == "http.response.start":
                kind = Headers(raw=message["headers"]).get("content-type", "")
                is_stream = kind.startswith("text/event-stream")
                if is_stream or not kind.startswith("application/json"):
                    return await send(message)
                start = message
                return None
            held += message.get("body", b"")
            is_last = not message.get("more_body", False)
            if is_stream:
                whole, _, rest = held.rpartition(b"\n\n")
                ready, held = (held, bytearray()) if is_last else (whole and whole + b"\n\n", rest)
                await send({**message, "body": self._in_events(bytes(ready))})
            elif not start:
                body, held = bytes(held), bytearray()
                await send({**message, "body": body})
            elif is_last:
                body = self._in_json(bytes(held))
                MutableHeaders(scope=start)["content-length"] = str(len(body))
                await send(start)
                await send({**message, "body": body})
            return None

        await self.app(scope, receive, send_with_field)

    def _in_events(self, events: bytes) -> bytes:
        if b'"usage"' not in events:
            return events
        lines = events.split(b"\n")
        return b"\n".join(
            b"data: " + self._in_json(line[6:]) if line.startswith(b"data: {") and b'"usage"' in line else line
            for line in lines
        )

    def _in_json(self, text: bytes) -> bytes:
        try:
            value = json.loads(text)
        except ValueError:
            return text
        return json.dumps(value, ensure_ascii=False).encode() if self._add(value) else text

    def _add(self, value: Any) -> bool:
        if not isinstance(value, dict):
            return False
        usage = value.get("usage")
        if isinstance(usage, dict):
            usage[FIELD] = self.active_parameters
            return True
        return self._add(value.get("response"))  # the Responses API's events
