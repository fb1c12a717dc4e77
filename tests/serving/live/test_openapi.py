"""The OpenAPI document describes the server: schemathesis sends generated requests to every route."""

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.specs.openapi.checks import status_code_conformance

pytestmark = pytest.mark.engine

EXAMPLES = 8
"""Per operation; the slow test has more."""


def _document(server) -> dict:
    with server.client() as client:
        return client.get("/openapi.json").raise_for_status().json()


def _fuzz(server, examples: int) -> list[str]:
    """Send generated requests to every operation; returns the problems."""
    schema = schemathesis.openapi.from_dict(_document(server))
    schema.config.update(base_url=server.url)
    problems: list[str] = []
    tried = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        strategy = operation.as_strategy()

        def check(case) -> None:
            nonlocal tried
            tried += 1
            response = case.call(headers=server.headers, timeout=120)
            try:
                case.validate_response(response, checks=[not_a_server_error, status_code_conformance])
            except (Exception, FailureGroup) as error:
                problems.append(f"{case.method} {case.path} -> {response.status_code}: {str(error)[:1500]}")

        given(case=strategy)(
            settings(
                max_examples=examples,
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )(check)
        )()
    assert tried > examples * 5
    return problems


def test_document_lists_routes_and_errors(server):
    document = _document(server)
    chat = document["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert {"200", "400", "401", "404", "408", "413", "429", "500", "503"} <= chat.keys()
    assert "/v1/tomoe/budget" in document["paths"]
    for status in ("400", "429"):
        schema = chat[status]["content"]["application/json"]["schema"]
        assert schema == {"$ref": "#/components/schemas/OpenAIError"}


def test_generated_requests_get_documented_responses(server):
    problems = _fuzz(server, EXAMPLES)
    assert not problems, "\n\n".join(problems[:5])
    assert httpx.get(f"{server.url}/ready", timeout=60).status_code == 200


@pytest.mark.slow
def test_many_generated_requests_get_documented_responses(server):
    problems = _fuzz(server, 100)
    assert not problems, "\n\n".join(problems[:5])
