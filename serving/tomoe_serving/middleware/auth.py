"""API keys: several, known by their hash only."""

import hashlib
import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from tomoe_serving.middleware.errors import RequestRefusedError, send_error

OPEN_PATHS = {"/", "/health", "/ready", "/metrics", "/favicon.ico"}
OPEN_PREFIXES = ("/static/",)
"""What a probe, Prometheus and a browser fetch without a key. The page itself asks for the key."""


class ApiKeyMiddleware:
    """ASGI layer: 401 unless ``Authorization: Bearer KEY`` (or ``x-api-key: KEY``) matches a hash.

    Args:
        hashes: ``sha256:HEX`` of each key; none switches the check off.
    """

    def __init__(self, app: ASGIApp, *, hashes: list[str]) -> None:
        self.app = app
        self.digests = [bytes.fromhex(entry.removeprefix("sha256:")) for entry in hashes]

    def is_known(self, key: str) -> bool:
        """Whether a key is one of ours; compares with all of them, each in constant time."""
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
        problem = "the API key is not known" if key else "an API key is needed: Authorization: Bearer KEY"
        await send_error(send, RequestRefusedError(401, problem, headers={"www-authenticate": "Bearer"}))


def _is_open(scope: Scope) -> bool:
    path = scope["path"]
    return scope["method"] == "OPTIONS" or path in OPEN_PATHS or path.startswith(OPEN_PREFIXES)
