"""Experts made visible: ``/v1/tomoe/experts``, traces of single requests, metrics beside vLLM's, and the page at ``/``.

    GET /v1/tomoe/experts                      counts since the start (``ExpertReport``)
    GET /v1/tomoe/experts/traces/{id}?start=N  experts of one request's tokens (``ExpertTrace``)
    GET /metrics                               vLLM's, and ours behind them
    GET /                                      the playground

A request is traced when it asks: ``"vllm_xargs": {"tomoe_trace": ID}`` in its body, with an id that the client makes up
and nobody can guess (whoever knows it, and has a key, can read the trace; it holds expert numbers, no text).

The engine must run with :data:`ENGINE_ARGUMENTS`; without them the page chats, and the rest says that it is off.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, HTTPException, Path, Query, Request
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.routing import Route

from tomoe_serving.api import playground
from tomoe_serving.api.expert_client import ExpertClient, ExpertsUnavailableError
from tomoe_serving.api.expert_metrics import exposition
from tomoe_serving.api.expert_reports import ExpertReport, ExpertTrace

ENGINE_ARGUMENTS: dict[str, object] = {
    "worker_extension_cls": "tomoe_vllm.observability.worker_extension.ExpertExtension",
    "additional_config": '{"tomoe_expert_statistics": true}',
}
"""Flags of vLLM's engine (``--worker-extension-cls``, ``--additional-config``), without which its workers do not count.
Values are as on a command line."""

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: int


class ErrorBody(BaseModel):
    """OpenAI's error body."""

    error: ErrorDetail


ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "A parameter is not valid"},
    404: {"model": ErrorBody, "description": "Expert statistics are off, or there is no such trace"},
    503: {"model": ErrorBody, "description": "The engine does not answer now"},
}


def attach_experts(app: FastAPI, engine_client: Any, settings: object) -> None:
    """Add the routes and the page to vLLM's ``app`` and make the workers count once it starts.

    ``engine_client``: vLLM's; ``settings``: the server's, none of which is needed today.
    """
    client = ExpertClient(engine_client)
    app.include_router(_routes(client))
    app.include_router(playground.router)
    _append_metrics(app, client)
    _start_with(app, client)


def _routes(client: ExpertClient) -> APIRouter:
    router = APIRouter(prefix="/v1/tomoe/experts", tags=["ToMoE"], responses=ERRORS)

    @router.get("", summary="Tokens per expert, load imbalance, neurons touched, paths taken")
    async def experts() -> ExpertReport:
        with _answered():
            return await client.report()

    @router.get("/traces/{trace_id}", summary="The expert of every token of a request that asked for a trace")
    async def trace(
        trace_id: Annotated[str, Path(min_length=1, max_length=128)],
        start: Annotated[int, Query(ge=0, le=1_000_000, description="First position to answer")] = 0,
    ) -> ExpertTrace:
        with _answered():
            found = await client.trace(trace_id, start)
        if found is None:
            raise HTTPException(
                404, 'there is no such trace: send the request with "vllm_xargs": {"tomoe_trace": ID}, and ask in time'
            )
        return found

    return router


@contextmanager
def _answered() -> Iterator[None]:
    """Turns :class:`ExpertsUnavailableError` into an HTTP answer."""
    try:
        yield
    except ExpertsUnavailableError as error:
        raise HTTPException(error.status, str(error)) from error


def _append_metrics(app: FastAPI, client: ExpertClient) -> None:
    """Put a ``/metrics`` before vLLM's that answers with vLLM's text and ours behind it."""
    own = next((r.endpoint for r in app.routes if isinstance(r, APIRoute) and r.path == "/metrics"), None)

    async def metrics(request: Request) -> Response:
        body = (await run_in_threadpool(own, request)).body if own is not None else b""
        with suppress(ExpertsUnavailableError):
            body += exposition(await client.report())
        return Response(body, headers={"Content-Type": METRICS_TYPE})

    app.router.routes.insert(0, Route("/metrics", metrics, methods=["GET"], include_in_schema=False))


def _start_with(app: FastAPI, client: ExpertClient) -> None:
    """Start counting when the app starts, before its first request."""
    lifespan = app.router.lifespan_context

    @asynccontextmanager
    async def with_experts(app: FastAPI) -> AsyncIterator[Any]:
        async with lifespan(app) as state:
            with suppress(ExpertsUnavailableError):
                await client.start()
            yield state

    app.router.lifespan_context = with_experts
