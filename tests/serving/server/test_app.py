"""The app built from vLLM's, with a FastAPI app in place of vLLM's."""

from types import SimpleNamespace

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from fastapi.testclient import TestClient
from starlette.middleware.cors import CORSMiddleware
from tomoe_serving.admission.controller import AdmissionController
from tomoe_serving.server.app import add_layers, build_app
from tomoe_serving.server.settings import ServerSettings, hash_key
from tomoe_serving.server.state import ServerState

ORIGIN = "https://example.org"


@pytest.fixture
def engine_client():
    async def collective_rpc(method, args=()):
        return ["expert statistics are off"]

    return SimpleNamespace(errored=False, collective_rpc=collective_rpc)


@pytest.fixture
def vllm_app():
    """An app with what vLLM's has: routes, state, lifespan, handlers, middleware and a stack that is built already."""
    app = FastAPI()
    app.state.name = "tiny"

    @app.get("/v1/models")
    def models(request: Request):
        return request.app.state.name

    @app.post("/v1/completions")
    def completions():
        raise ValueError("a bad request")

    @app.get("/invocations")
    def invocations():
        return "for another launcher"

    app.add_exception_handler(ValueError, lambda request, error: JSONResponse(str(error), 400))
    app.add_middleware(CORSMiddleware, allow_origins=[ORIGIN])
    app.middleware_stack = app.build_middleware_stack()
    return app


@pytest.fixture
def client(vllm_app, engine_client):
    state = ServerState(is_warm=True)
    app = build_app(vllm_app, settings=None, state=state, budget=None, engine_client=engine_client)
    with TestClient(app, raise_server_exceptions=False) as client:
        client.server_state = state
        yield client


def test_routes_of_vllm_keep_their_state_and_handlers(client):
    assert client.get("/v1/models").json() == "tiny"
    response = client.post("/v1/completions", headers={"Origin": ORIGIN})
    assert (response.status_code, response.json()) == (400, "a bad request")
    assert response.headers["access-control-allow-origin"] == ORIGIN


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/invocations", 404), ("GET", "/docs", 404), ("GET", "/nope", 404), ("PUT", "/v1/models", 405)],
)
def test_other_routes_have_openais_error_body(client, method, path, status):
    response = client.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["code"] == status
    assert path in response.json()["error"]["message"]


def test_vllms_app_is_not_changed(vllm_app, engine_client):
    before = list(vllm_app.routes), dict(vllm_app.exception_handlers), vllm_app.middleware_stack
    build_app(vllm_app, settings=None, state=ServerState(), budget=None, engine_client=engine_client)
    assert (list(vllm_app.routes), dict(vllm_app.exception_handlers), vllm_app.middleware_stack) == before


def test_lifespan_of_vllm_runs(engine_client):
    async def lifespan(app):
        app.state.is_started = True
        yield

    vllm_app = FastAPI(lifespan=lifespan)
    vllm_app.add_api_route("/version", lambda: "0")
    app = build_app(vllm_app, settings=None, state=ServerState(), budget=None, engine_client=engine_client)
    with TestClient(app):
        assert vllm_app.state.is_started


def test_an_app_without_vllms_routes_is_refused(engine_client):
    with pytest.raises(RuntimeError, match="none of the routes"):
        build_app(FastAPI(), settings=None, state=ServerState(), budget=None, engine_client=engine_client)


def test_embeddings_are_refused_with_the_reason(client):
    response = client.post("/v1/embeddings", json={})
    assert response.status_code == 400
    assert "generates text only" in response.json()["error"]["message"]


def test_probes_follow_the_state_and_the_engine(client, engine_client):
    def statuses():
        return client.get("/health").status_code, client.get("/ready").status_code

    assert statuses() == (200, 200)
    client.server_state.is_draining = True
    assert statuses() == (200, 503)
    client.server_state.is_draining = False
    engine_client.errored = True
    assert statuses() == (503, 503)


def test_document_lists_the_served_routes(client):
    paths = client.get("/openapi.json").json()["paths"]
    assert {"/v1/models", "/v1/completions", "/v1/tomoe/budget", "/health", "/v1/embeddings"} <= paths.keys()
    assert "/invocations" not in paths
    assert "429" in paths["/v1/completions"]["post"]["responses"]


def test_layers_are_in_order(client, tmp_path):
    """A request without a key is logged and refused before its body is read; a key lets the next layer refuse it."""
    app = add_layers(
        client.app,
        settings=ServerSettings(checkpoint=tmp_path, api_keys=[hash_key("key")], max_body_bytes=10),
        state=ServerState(is_draining=True),
        admission=AdmissionController(max_sequences=1, queue_size=1),
        active_parameters=7,
        max_model_len=100,
    )
    with TestClient(app) as outer:
        key = {"x-api-key": "key"}
        assert outer.post("/v1/completions", content=b"x" * 99).status_code == 401
        assert outer.post("/v1/completions", content=b"x" * 99, headers=key).status_code == 413
        response = outer.post("/v1/completions", content=b"{}", headers=key)
    assert response.status_code == 503
    assert len(response.headers["x-request-id"]) == 32
