"""API keys, request log, active parameters in usage, and the gate: each layer alone."""

import json
import logging

import pytest
from tomoe_serving.admission.controller import AdmissionController
from tomoe_serving.middleware.admission import AdmissionMiddleware, count_sequences
from tomoe_serving.middleware.auth import ApiKeyMiddleware
from tomoe_serving.middleware.body import BodyMiddleware
from tomoe_serving.middleware.request_log import RequestLogMiddleware
from tomoe_serving.middleware.usage import UsageMiddleware
from tomoe_serving.server.settings import hash_key
from tomoe_serving.server.state import ServerState

from tests.helpers.asgi import ask, echo, json_app, stream_app

KEYS = [hash_key("first"), hash_key("second")]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"Authorization": "Bearer first"}, 200),
        ({"Authorization": "bearer second"}, 200),
        ({"x-api-key": "second"}, 200),
        ({"Authorization": "Bearer third"}, 401),
        ({"Authorization": "Basic first"}, 401),
        ({"Authorization": f"Bearer {KEYS[0]}"}, 401),  # the hash is no key
        ({"Authorization": b"Bearer \xe9"}, 401),
    ],
)
def test_one_of_several_keys_opens(headers, status):
    response = ask(ApiKeyMiddleware(echo, hashes=KEYS), headers=headers)
    assert response.status_code == status
    if status == 401:
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["type"] == "AuthenticationError"


@pytest.mark.parametrize(("path", "status"), [("/health", 200), ("/", 200), ("/static/page.js", 200), ("/v1", 401)])
def test_probes_and_the_page_are_open(path, status):
    assert ask(ApiKeyMiddleware(echo, hashes=KEYS), "GET", path).status_code == status


def test_no_keys_means_open():
    assert ask(ApiKeyMiddleware(echo, hashes=[])).status_code == 200


def test_request_log_has_the_body_only_when_told(caplog):
    caplog.set_level(logging.INFO)
    body = b'{"prompt": "a secret"}'
    for log_prompts in (False, True):
        response = ask(
            RequestLogMiddleware(echo, log_prompts=log_prompts), content=body, headers={"x-request-id": "abc"}
        )
        assert response.headers["x-request-id"] == "abc"
    quiet, loud = [record for record in caplog.records if record.name == "tomoe_serving.access"]
    assert (quiet.request_id, quiet.status, quiet.bytes) == ("abc", 200, len(body))
    assert "secret" not in str(vars(quiet))
    assert loud.body == body.decode()


@pytest.mark.parametrize("given", ["", "a" * 200, "a\tb", 'a"b', "é".encode("latin-1")])
def test_a_strange_request_id_is_replaced(given):
    got = ask(RequestLogMiddleware(echo), headers={"x-request-id": given}).headers["x-request-id"]
    assert len(got) == 32


USAGE = {"prompt_tokens": 1, "completion_tokens": 2}
ASKED = {"X-ToMoE-Usage": "active-parameters"}


def test_usage_of_a_whole_answer_gets_the_field():
    app = UsageMiddleware(json_app({"usage": USAGE, "text": "é"}), active_parameters=7, always=False)
    assert ask(app).json() == {"usage": USAGE, "text": "é"}
    assert ask(app, headers=ASKED).json() == {"usage": USAGE | {"active_parameters_per_token": 7}, "text": "é"}


def test_usage_of_the_responses_api_is_one_level_down():
    app = UsageMiddleware(json_app({"response": {"usage": USAGE}}), active_parameters=7, always=True)
    assert ask(app).json()["response"]["usage"]["active_parameters_per_token"] == 7


def test_usage_of_a_stream_gets_it_however_the_events_are_cut():
    events = [b'data: {"choices": [{"text": "usage \\n\\n"}]}\n\n', b'data: {"usage": null}\n\n']
    events += [b'event: x\ndata: {"usage": {"prompt_tokens": 1}}\n\n', b"data: [DONE]\n\n"]
    whole = b"".join(events)
    for cut in (events, [whole], [whole[:70], whole[70:105], whole[105:]], [bytes([byte]) for byte in whole]):
        text = ask(UsageMiddleware(stream_app(cut), active_parameters=7, always=True)).text
        data = [line[6:] for line in text.split("\n") if line.startswith("data: ")]
        assert json.loads(data[0])["choices"][0]["text"] == "usage \n\n"
        assert json.loads(data[2]) == {"usage": {"prompt_tokens": 1, "active_parameters_per_token": 7}}
        assert data[3] == "[DONE]"
        assert text.count("\n\n") == 4


@pytest.mark.parametrize(
    ("body", "sequences"),
    [
        ({"prompt": "a"}, 1),
        ({"prompt": [1, 2, 3]}, 1),
        ({"prompt": ["a", "b"]}, 2),
        ({"prompt": [[1], [2], [3]], "n": 2}, 6),
        ({"messages": [], "n": 4}, 4),
        ({"n": "x"}, 1),
        (None, 1),
    ],
)
def test_sequences_are_counted_before_vllm_sees_the_request(body, sequences):
    assert count_sequences(body) == sequences


def _gate(app=echo, *, queue_size=2, **condition):
    admission = AdmissionController(max_sequences=1, queue_size=queue_size)
    gate = AdmissionMiddleware(app, state=ServerState(is_warm=True, **condition), admission=admission)
    return BodyMiddleware(gate, max_bytes=10_000, timeout=9, max_tokens=9), gate


@pytest.mark.parametrize(("condition", "said"), [({"is_draining": True}, "stopping"), ({"is_dead": True}, "died")])
def test_a_closed_gate_says_when_to_come_back(condition, said):
    app, gate = _gate(drain_timeout=12, **condition)
    response = ask(app, json={})
    assert response.status_code == 503
    assert response.headers["retry-after"] == "12"
    assert said in response.json()["error"]["message"]
    assert ask(app, "GET", "/health").status_code == 200
    assert not gate.state.is_ready


def test_a_full_queue_is_a_429_and_leaves_no_trace():
    app, gate = _gate()
    with gate.admission.enqueue(3):
        response = ask(app, json={"prompt": "a"})
        assert ask(app, "POST", "/tokenize", json={}).status_code == 200
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 1
    assert gate.state.refusals["queue_full"] == 1
    assert ask(app, json={"prompt": "a"}).status_code == 200
    assert gate.admission.pending == gate.state.generating == 0


def test_what_never_fits_is_a_400_not_a_429():
    app, _ = _gate()
    assert ask(app, json={"prompt": ["a"] * 4}).status_code == 400
