"""Puts the layers around vLLM's app, and our routes into it.

Outermost first: request log, API keys, bodies, active parameters, gate, vLLM's app. All layers are plain ASGI:
Starlette's BaseHTTPMiddleware would hide a client's disconnect from vLLM, which then goes on generating.
"""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from tomoe_serving.admission.controller import Admission
from tomoe_serving.api.active_budget import BudgetSource, budget_router
from tomoe_serving.api.experts import attach_experts
from tomoe_serving.api.openapi import document_errors
from tomoe_serving.middleware.admission import Condition, Gate
from tomoe_serving.middleware.auth import ApiKeys
from tomoe_serving.middleware.body import Bodies
from tomoe_serving.middleware.errors import error_body
from tomoe_serving.middleware.request_log import RequestLog
from tomoe_serving.middleware.usage import ActiveParameters
from tomoe_serving.server.settings import ServerSettings

SERVED_PATHS = {
    *("/v1/models", "/v1/chat/completions", "/v1/completions"),
    *("/v1/responses", "/v1/responses/{response_id}", "/v1/responses/{response_id}/cancel"),
    *("/v1/messages", "/v1/messages/count_tokens", "/tokenize", "/detokenize"),
    *("/version", "/metrics", "/openapi.json"),
}
"""vLLM's routes that are served. Those for other launchers' operators (SageMaker, elastic expert parallelism,
disaggregation), its private batch format and the documentation pages, which load from a CDN, are not."""

REFUSED_PATHS = ("/v1/embeddings", "/v1/audio/transcriptions", "/v1/images/generations")
"""OpenAI routes that a text generator cannot serve: said in so many words, not with a 404."""


def add_routes(
    app: FastAPI,
    *,
    settings: ServerSettings,
    condition: Condition,
    budget: BudgetSource,
    engine_client: Any,
) -> None:
    """Change vLLM's app in place: our routes in, routes that are not served out, every error an OpenAI body."""
    app.router.routes[:] = [r for r in app.router.routes if getattr(r, "path", None) in SERVED_PATHS]
    add_probes(app, lambda: condition.is_ready and not engine_client.errored, lambda: not engine_client.errored)
    app.include_router(budget_router(lambda: budget))
    attach_experts(app, engine_client, settings)
    for path in REFUSED_PATHS:
        app.add_api_route(path, _refuse, methods=["POST"], status_code=400, tags=["refused"])
    app.add_exception_handler(HTTPException, _as_openai_error)  # type: ignore[arg-type]
    app.middleware_stack = None  # vLLM's app comes with one already built, which would not know the handler
    document_errors(app)


def add_probes(app: FastAPI, is_ready: Callable[[], bool], is_alive: Callable[[], bool]) -> None:
    """``/health``: the process and its engine live. ``/ready``: it has generated and takes requests."""

    @app.get("/health", tags=["probes"])
    async def health() -> Response:
        """200 while the engine lives, else 503."""
        return Response(status_code=200 if is_alive() else 503)

    @app.get("/ready", tags=["probes"])
    async def ready() -> Response:
        """200 once a token was generated, 503 while draining or dead."""
        return Response(status_code=200 if is_ready() else 503)


def wrap(
    app: ASGIApp,
    *,
    settings: ServerSettings,
    condition: Condition,
    admission: Admission,
    active_parameters: int,
    max_model_len: int,
) -> ASGIApp:
    """The layers around ``app``."""
    app = Gate(app, condition=condition, admission=admission)
    app = ActiveParameters(app, active_parameters=active_parameters, always=settings.report_active_parameters)
    app = Bodies(app, max_bytes=settings.max_body_bytes, timeout=settings.body_timeout, max_tokens=max_model_len)
    app = ApiKeys(app, hashes=settings.api_keys)
    return RequestLog(app, log_prompts=settings.log_prompts)


async def _refuse(request: Request) -> Response:
    """This server generates text only."""
    message = f"{request.url.path} is not supported: this server generates text and has no model for that"
    return Response(error_body(400, message), status_code=400, media_type="application/json")


async def _as_openai_error(request: Request, error: HTTPException) -> Response:
    """FastAPI's own 404 and 405 in OpenAI's shape."""
    message = f"{request.method} {request.url.path}: {error.detail}"
    return Response(
        error_body(error.status_code, message), error.status_code, error.headers, media_type="application/json"
    )
