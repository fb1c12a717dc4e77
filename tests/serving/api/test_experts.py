"""The routes with an engine whose statistics are off, that is slow or dead, or that gets many requests."""

import asyncio

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry, Gauge
from prometheus_fastapi_instrumentator import Instrumentator
from tomoe_serving.api import expert_client
from tomoe_serving.api.expert_client import ExpertClient, ExpertsUnavailableError
from tomoe_serving.api.experts import ENGINE_ARGUMENTS, attach_experts

from tests.serving.api.test_expert_reports import TWO_STAGES


class Engine:
    """The method of vLLM's client that is used; the arguments describe the worker's response."""

    def __init__(self, *, reason=None, delay_s=0.0, error=None):
        self.reason, self.delay_s, self.error, self.calls = reason, delay_s, error, []

    async def collective_rpc(self, method, timeout=None, args=(), kwargs=None):
        self.calls.append(method)
        await asyncio.sleep(self.delay_s)
        if self.error is not None:
            raise self.error
        if method == "tomoe_start_experts":
            return [self.reason]
        return TWO_STAGES if method == "tomoe_expert_counts" else [None]


def client_of(engine) -> TestClient:
    app = FastAPI()
    registry = CollectorRegistry()
    Gauge("vllm_example", "A metric of vLLM", registry=registry).set(1)
    Instrumentator(registry=registry).expose(app)
    attach_experts(app, engine)
    return TestClient(app)


def test_app_starts_the_counting():
    engine = Engine()
    with client_of(engine) as client:
        assert engine.calls == ["tomoe_start_experts"]
        assert client.get("/v1/tomoe/experts").json()["load_imbalance"] == [1.0, 4.0]


def test_metrics_follow_those_of_vllm():
    with client_of(Engine()) as client:
        answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert answer.text.startswith("# HELP vllm_example ")
    assert "vllm_example 1.0\n# HELP tomoe_expert_tokens_total " in answer.text


@pytest.mark.parametrize(
    ("engine", "status", "message"),
    [
        (Engine(reason="expert statistics are off; start"), 404, "expert statistics are off; start"),
        (
            Engine(error=AttributeError("no attribute 'tomoe_start_experts'")),
            404,
            "the workers have no ToMoE extension",
        ),
        (Engine(error=RuntimeError("EngineDead")), 503, "the engine does not respond: EngineDead"),
        (None, 503, "the engine is not ready yet"),
    ],
)
def test_without_statistics_the_reason_is_returned_and_vllms_metrics_remain(engine, status, message):
    with client_of(engine) as client:
        for path in ("/v1/tomoe/experts", "/v1/tomoe/experts/traces/abc"):
            answer = client.get(path)
            assert answer.status_code == status
            assert message in answer.json()["detail"]
        assert client.get("/metrics").text.endswith("vllm_example 1.0\n")
        assert client.get("/").status_code == 200


def test_engine_without_statistics_is_called_once():
    engine = Engine(reason="off")
    with client_of(engine) as client:
        for _ in range(5):
            client.get("/metrics")
    assert engine.calls == ["tomoe_start_experts"]


def test_concurrent_requests_share_one_call(monkeypatch):
    engine = Engine(delay_s=0.05)
    client = ExpertClient(engine)

    async def many():
        await asyncio.gather(*(client.report() for _ in range(50)))
        await asyncio.gather(*(client.trace("abc", 0) for _ in range(50)))

    asyncio.run(many())
    assert engine.calls == ["tomoe_start_experts", "tomoe_expert_counts", "tomoe_expert_trace"]


def test_last_report_is_returned_during_a_long_step(monkeypatch):
    monkeypatch.setattr(expert_client, "COUNTS_AGE_S", 0.0)
    monkeypatch.setattr(expert_client, "RPC_TIMEOUT_S", 0.2)
    engine = Engine()
    client = ExpertClient(engine)

    async def ask():
        first = await client.report()
        engine.delay_s = 60
        assert await client.report() is first
        with pytest.raises(ExpertsUnavailableError, match="in a long step"):
            await client.trace("abc", 0)

    asyncio.run(ask())


def test_unknown_trace_is_404_and_invalid_parameters_are_refused():
    with client_of(Engine()) as client:
        answer = client.get("/v1/tomoe/experts/traces/abc")
        assert answer.status_code == 404
        assert '"vllm_xargs": {"tomoe_trace": ID}' in answer.json()["detail"]
        assert client.get("/v1/tomoe/experts/traces/abc?start=-1").status_code == 422  # 400 in vLLM's app
        assert client.get(f"/v1/tomoe/experts/traces/{'x' * 129}").status_code == 422


def test_playground_files_have_a_strict_policy():
    with client_of(Engine()) as client:
        for path, kind in [
            ("/", "text/html"),
            ("/static/playground/main.js", "text/javascript"),
            ("/static/playground/style.css", "text/css"),
        ]:
            answer = client.get(path)
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith(kind)
            policy = answer.headers["content-security-policy"]
            assert policy.startswith("default-src 'none';")
            assert "unsafe" not in policy
        for name in ("../experts.py", "%2e%2e%2fexperts.py", "nothing.js", "__init__.py"):
            assert client.get(f"/static/playground/{name}").status_code == 404


def test_engine_arguments_are_flags_of_vllm():
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    flags = [word for name, value in ENGINE_ARGUMENTS.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    args = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(flags)
    assert args.additional_config == {"tomoe_expert_statistics": True}
    module, _, name = args.worker_extension_cls.rpartition(".")
    assert hasattr(__import__(module, fromlist=[name]), name)
