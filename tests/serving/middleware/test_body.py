import asyncio

import pytest
from tomoe_serving.middleware.body import BodyMiddleware

from tests.helpers.asgi import ask, echo

JSON = {"content-type": "application/json"}


def _layer(**options):
    return BodyMiddleware(echo, **({"max_bytes": 100, "timeout": 60, "max_tokens": 50} | options))


@pytest.mark.parametrize("body", [b'{"a": 1}', b'"text"', b"[[1]]", b'{"max_tokens": 50}', '{"a": "é😀"}'.encode()])
def test_valid_bodies_reach_the_app_unchanged(body):
    response = ask(_layer(), content=body, headers=JSON)
    assert (response.status_code, response.content) == (200, body)


def test_a_body_of_another_type_is_not_read_as_json():
    assert ask(_layer(), content=b"\xff", headers={"content-type": "audio/wav"}).content == b"\xff"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"a": NaN}', "not valid JSON"),
        (b'{"a": -Infinity}', "not valid JSON"),
        (b"\xc3(", "UTF-8 at byte 0"),
        (b'"\\ud800"', "not valid JSON"),
        (b'{"max_tokens": 51}', "context holds 50"),
        (b'{"max_completion_tokens": 1e300}', "context holds 50"),
    ],
)
def test_invalid_bodies_are_refused(body, said):
    response = ask(_layer(), content=body, headers=JSON)
    assert response.status_code == 400
    assert said in response.json()["error"]["message"]


def test_error_names_the_parameter():
    response = ask(_layer(), content=b'{"max_tokens": 51}', headers=JSON)
    assert response.json()["error"]["param"] == "max_tokens"


@pytest.mark.parametrize("depth", [101, 5000])
def test_deep_nesting_is_refused(depth):
    response = ask(_layer(max_bytes=100_000), content=b"[" * depth + b"]" * depth, headers=JSON)
    assert response.status_code == 400
    assert "nested deeper" in response.json()["error"]["message"]


def test_largest_depth_is_accepted():
    body = b'{"a":' * 99 + b"1" + b"}" * 99
    assert ask(_layer(max_bytes=10_000), content=body, headers=JSON).status_code == 200


@pytest.mark.parametrize(("size", "status"), [(100, 200), (101, 413), (5000, 413)])
def test_size_is_limited(size, status):
    assert ask(_layer(), content=b"x" * size).status_code == status


def test_size_of_chunked_bodies_is_limited():
    async def chunks():
        for _ in range(30):
            yield b"x" * 10

    response = ask(_layer(), content=chunks())
    assert response.status_code == 413
    assert response.headers["connection"] == "close"


def _call(app, messages):
    """Call an app with these messages to receive; returns what it sent."""

    async def go():
        waiting, sent = list(messages), []

        async def receive():
            return waiting.pop(0) if waiting else await asyncio.sleep(3600)

        async def send(message):
            sent.append(message)

        await app({"type": "http", "method": "POST", "path": "/", "headers": []}, receive, send)
        return sent

    return asyncio.run(go())


def test_late_body_is_a_408():
    sent = _call(_layer(timeout=0.01), [{"type": "http.request", "body": b"x", "more_body": True}])
    assert sent[0]["status"] == 408


def test_disconnected_client_gets_no_response():
    messages = [{"type": "http.request", "body": b"x", "more_body": True}, {"type": "http.disconnect"}]
    assert _call(_layer(), messages) == []


def test_a_disconnect_after_the_body_reaches_the_app():
    seen = []

    async def app(scope, receive, send):
        seen.extend([await receive(), await receive()])

    messages = [{"type": "http.request", "body": b"x", "more_body": False}, {"type": "http.disconnect"}]
    _call(BodyMiddleware(app, max_bytes=9, timeout=9, max_tokens=9), messages)
    assert [message["type"] for message in seen] == ["http.request", "http.disconnect"]
