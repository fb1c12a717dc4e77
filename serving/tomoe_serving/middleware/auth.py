"""API keys. The server knows their hashes only."""

import hashlib
import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from tomoe_serving.middleware.errors import RequestRefusedError, send_error

OPEN_PATHS = {"/", "/health", "/ready", "/metrics", "/favicon.ico"}
OPEN_PREFIXES = ("/static/",)
"""Paths without a key: probes, Prometheus, and the playground, which has a field for the key."""


class ApiKeyMiddleware:
    """Answers 401 unless ``Authorization: Bearer KEY`` or ``x-api-key: KEY`` matches a hash.

    Args:
        hashes: ``sha256:HEX`` of each key; an empty list disables the check.
    """

    def __init__(self, app: ASGIApp, *, hashes: list[str]) -> None:
        self.app = app
        self.digests = [bytes.fromhex(entry.removeprefix("sha256:")) for entry in hashes]

    def is_known(self, key: str) -> bool:
        """Whether a key is valid. It is compared with every hash, each in constant time."""
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        matches = [hmac.compare_digest(digest, known) for known in self.digests]
        return any(matches)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self.digests or _is_open(scope):
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            key = headers.get("x-api-key", "")
        if self.is_known(key.strip()):
            return await self.app(scope, receive, send)
        problem = "the API key is not valid" if key else "an API key is required: Authorization: Bearer KEY"
        await send_error(send, RequestRefusedError(401, problem, headers={"www-authenticate": "Bearer"}))


def _is_open(scope: Scope) -> bool:
    path = scope["path"]
    return scope["method"] == "OPTIONS" or path in OPEN_PATHS or path.startswith(OPEN_PREFIXES)
