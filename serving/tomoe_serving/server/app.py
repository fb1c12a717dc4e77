"""The served app: vLLM's routes and ours, inside the layers of ``middleware/``.

Outermost first: request log, API keys, bodies, usage, admission, routes. All layers are plain ASGI: Starlette's
BaseHTTPMiddleware would hide a client's disconnect from vLLM, which would go on generating.
"""

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

from tomoe_serving.admission.controller import AdmissionController
from tomoe_serving.api.compute_budget import BudgetSource, budget_router
from tomoe_serving.api.experts import attach_experts
from tomoe_serving.api.openapi import document_errors
from tomoe_serving.middleware.admission import AdmissionMiddleware
from tomoe_serving.middleware.auth import ApiKeyMiddleware
from tomoe_serving.middleware.body import BodyMiddleware
from tomoe_serving.middleware.errors import error_body
from tomoe_serving.middleware.request_log import RequestLogMiddleware
from tomoe_serving.middleware.usage import UsageMiddleware
from tomoe_serving.server.settings import ServerSettings
from tomoe_serving.server.state import ServerState

SERVED_PATHS = {
    *("/v1/models", "/v1/chat/completions", "/v1/completions"),
    *("/v1/responses", "/v1/responses/{response_id}", "/v1/responses/{response_id}/cancel"),
    *("/v1/messages", "/v1/messages/count_tokens", "/tokenize", "/detokenize"),
    *("/version", "/metrics"),
}
"""Routes of vLLM that are served. Not served are those for other launchers (SageMaker, elastic expert parallelism,
disaggregation), vLLM's private batch format, and the documentation pages, which load scripts from a CDN."""

REFUSED_PATHS = ("/v1/embeddings", "/v1/audio/transcriptions", "/v1/images/generations")
"""OpenAI routes that a text generator cannot serve. They answer with the reason instead of 404."""


def build_app(
    vllm_app: FastAPI,
    *,
    settings: ServerSettings,
    state: ServerState,
    budget: BudgetSource,
    engine_client: Any,
) -> FastAPI:
    """A FastAPI app with vLLM's served routes, middleware, exception handlers and state, and with our routes.

    A new app, because vLLM's comes with its middleware stack built: it ignores handlers that are added afterwards.
    """
    routes = [route for route in vllm_app.routes if getattr(route, "path", None) in SERVED_PATHS]
    if not routes:  # FastAPI 0.137 and later include routers lazily: their routes would be missed
        raise RuntimeError(
            "vLLM's app has none of the routes that are served; this release of FastAPI is not supported"
        )
    handlers: dict[Any, Any] = vllm_app.exception_handlers | {HTTPException: _as_openai_error}
    app = FastAPI(
        routes=routes,
        middleware=vllm_app.user_middleware,
        exception_handlers=handlers,
        lifespan=vllm_app.router.lifespan_context,
        root_path=vllm_app.root_path,
        openapi_url=vllm_app.openapi_url,
        docs_url=None,
        redoc_url=None,
    )
    app.state = vllm_app.state
    add_probes(app, lambda: state.is_ready and not engine_client.errored, lambda: not engine_client.errored)
    app.include_router(budget_router(lambda: budget))
    attach_experts(app, engine_client)
    for path in REFUSED_PATHS:
        app.add_api_route(path, _refuse, methods=["POST"], status_code=400, tags=["refused"])
    document_errors(app)
    return app


def add_probes(app: FastAPI, is_ready: Callable[[], bool], is_alive: Callable[[], bool]) -> None:
    """``/health``: the process and its engine are alive. ``/ready``: the server accepts requests."""

    @app.get("/health", tags=["probes"])
    async def health() -> Response:
        """200 while the engine is alive, else 503."""
        return Response(status_code=200 if is_alive() else 503)

    @app.get("/ready", tags=["probes"])
    async def ready() -> Response:
        """200 once a token was generated, 503 while draining and after the engine has died."""
        return Response(status_code=200 if is_ready() else 503)


def add_layers(
    app: ASGIApp,
    *,
    settings: ServerSettings,
    state: ServerState,
    admission: AdmissionController,
    active_parameters: int,
    max_model_len: int,
) -> ASGIApp:
    """``app`` inside the layers, in the order of the module's docstring."""
    app = AdmissionMiddleware(app, state=state, admission=admission)
    app = UsageMiddleware(app, active_parameters=active_parameters, always=settings.report_active_parameters)
    app = BodyMiddleware(
        app, max_bytes=settings.max_body_bytes, timeout=settings.body_timeout, max_tokens=max_model_len
    )
    app = ApiKeyMiddleware(app, hashes=settings.api_keys)
    return RequestLogMiddleware(app, log_prompts=settings.log_prompts)


async def _refuse(request: Request) -> Response:
    """This server generates text only."""
    message = f"{request.url.path} is not supported: this server generates text only"
    return Response(error_body(400, message), status_code=400, media_type="application/json")


async def _as_openai_error(request: Request, error: HTTPException) -> Response:
    """FastAPI's own 404 and 405 with OpenAI's error body."""
    message = f"{request.method} {request.url.path}: {error.detail}"
    return Response(
        error_body(error.status_code, message), error.status_code, error.headers, media_type="application/json"
    )
