"""Routes for expert statistics and traces, and the playground.

    GET /v1/tomoe/experts                      counts since the start (``ExpertReport``)
    GET /v1/tomoe/experts/traces/{id}?start=N  experts of one request's tokens (``ExpertTrace``)
    GET /metrics                               vLLM's metrics, followed by those of the experts
    GET /                                      the playground

A request is traced if its body has ``"vllm_xargs": {"tomoe_trace": ID}``. The client chooses the id and makes it hard
to guess: every client that has a key and the id can read the trace, which holds expert numbers and no text.

The engine must run with :data:`ENGINE_ARGUMENTS`. Without them the playground still chats, and the other routes respond
with 404.
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
"""Flags of vLLM's engine (``--worker-extension-cls``, ``--additional-config``) that make its workers count. Values are
as on a command line."""

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
    404: {"model": ErrorBody, "description": "Expert statistics are off, or the trace does not exist"},
    503: {"model": ErrorBody, "description": "The engine does not respond now"},
}


def attach_experts(app: FastAPI, engine_client: Any) -> None:
    """Add the routes and the playground to ``app``, and make the workers count once it starts."""
    client = ExpertClient(engine_client)
    app.include_router(_routes(client))
    app.include_router(playground.router)
    _append_metrics(app, client)
    _start_with(app, client)


def _routes(client: ExpertClient) -> APIRouter:
    router = APIRouter(prefix="/v1/tomoe/experts", tags=["ToMoE"], responses=ERRORS)

    @router.get("", summary="Tokens per expert, load imbalance, neurons used, execution paths")
    async def experts() -> ExpertReport:
        with _http_errors():
            return await client.report()

    @router.get("/traces/{trace_id}", summary="The expert of every token of a traced request")
    async def trace(
        trace_id: Annotated[str, Path(min_length=1, max_length=128)],
        start: Annotated[int, Query(ge=0, le=1_000_000, description="First position of the response")] = 0,
    ) -> ExpertTrace:
        with _http_errors():
            found = await client.trace(trace_id, start)
        if found is None:
            raise HTTPException(
                404,
                'no such trace: send a request with "vllm_xargs": {"tomoe_trace": ID}; only the newest are kept',
            )
        return found

    return router


@contextmanager
def _http_errors() -> Iterator[None]:
    """Turn :class:`ExpertsUnavailableError` into an HTTP error."""
    try:
        yield
    except ExpertsUnavailableError as error:
        raise HTTPException(error.status, str(error)) from error


def _append_metrics(app: FastAPI, client: ExpertClient) -> None:
    """Add a ``/metrics`` that responds with vLLM's text and the experts' after it.

    Starlette takes the first route that matches and has no way to replace one, so the new route goes to the front.
    """
    own = next((r.endpoint for r in app.routes if isinstance(r, APIRoute) and r.path == "/metrics"), None)

    async def metrics(request: Request) -> Response:
        body = (await run_in_threadpool(own, request)).body if own is not None else b""
        with suppress(ExpertsUnavailableError):
            body += exposition(await client.report())
        return Response(body, headers={"Content-Type": METRICS_TYPE})

    app.router.routes.insert(0, Route("/metrics", metrics, methods=["GET"], include_in_schema=False))


def _start_with(app: FastAPI, client: ExpertClient) -> None:
    """Start counting when the app starts, before its first request.

    A lifespan is given to an app when it is made, and vLLM makes this one under ``vllm serve``; so it is wrapped.
    """
    lifespan = app.router.lifespan_context

    @asynccontextmanager
    async def with_experts(app: FastAPI) -> AsyncIterator[Any]:
        async with lifespan(app) as state:
            with suppress(ExpertsUnavailableError):
                await client.start()
            yield state

    app.router.lifespan_context = with_experts
