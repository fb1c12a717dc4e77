"""Layers of the server called without a server: one request in, one response out."""

import asyncio
from collections.abc import Callable

import httpx
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse


async def echo(scope, receive, send) -> None:
    """An app that answers with the body it got."""
    if scope["type"] == "http":
        await Response(await Request(scope, receive).body())(scope, receive, send)


def answering(make: Callable[[], Response]):
    """An app that always answers with a new ``make()``."""

    async def app(scope, receive, send) -> None:
        await make()(scope, receive, send)

    return app


def json_app(value: object):
    """An app that answers with JSON."""
    return answering(lambda: JSONResponse(value))


def stream_app(parts: list[bytes]):
    """An app that streams server-sent events, in exactly these parts."""

    async def content():
        for part in parts:
            yield part

    return answering(lambda: StreamingResponse(content(), media_type="text/event-stream"))


def ask(app, method: str = "POST", path: str = "/v1/completions", **request) -> httpx.Response:
    """Response of an ASGI app."""

    async def go() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **request)

    return asyncio.run(go())
