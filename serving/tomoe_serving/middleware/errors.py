"""OpenAI error bodies, the exception that carries one, and the ASGI response."""

import json
from collections.abc import Mapping
from http import HTTPStatus

from starlette.types import Send

TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    405: "MethodNotAllowedError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    415: "UnsupportedMediaTypeError",
    429: "RateLimitError",
    431: "RequestTooLargeError",
    503: "ServiceUnavailableError",
}


class RequestRefusedError(Exception):
    """A request that is refused with an HTTP ``status`` and one sentence."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.headers = dict(headers or {})


def error_type(status: int) -> str:
    """Name of an error in vLLM's and OpenAI's error bodies."""
    return TYPES.get(status) or HTTPStatus(status).phrase.replace(" ", "") + "Error"


def error_body(status: int, message: str, param: str | None = None) -> bytes:
    """``{"error": {"message", "type", "param", "code"}}`` as JSON."""
    error = {"message": message, "type": error_type(status), "param": param, "code": status}
    return json.dumps({"error": error}).encode()


async def send_error(send: Send, error: RequestRefusedError) -> None:
    """Send the error as the response of a request that has none yet."""
    body = error_body(error.status, error.message, error.param)
    headers = {"content-type": "application/json", "content-length": str(len(body))} | error.headers
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
