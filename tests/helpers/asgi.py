"""Call an ASGI app without a server."""

import asyncio
from collections.abc import Callable

import httpx
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse


async def echo(scope, receive, send) -> None:
    """An app that returns the request body."""
    if scope["type"] == "http":
        await Response(await Request(scope, receive).body())(scope, receive, send)


def responding(make: Callable[[], Response]):
    """An app that responds with ``make()``."""

    async def app(scope, receive, send) -> None:
        await make()(scope, receive, send)

    return app


def json_app(value: object):
    """An app that responds with JSON."""
    return responding(lambda: JSONResponse(value))


def stream_app(parts: list[bytes]):
    """An app that streams server-sent events in these parts."""

    async def content():
        for part in parts:
            yield part

    return responding(lambda: StreamingResponse(content(), media_type="text/event-stream"))


def ask(app, method: str = "POST", path: str = "/v1/completions", **request) -> httpx.Response:
    """Response of an ASGI app."""

    async def go() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **request)

    return asyncio.run(go())
