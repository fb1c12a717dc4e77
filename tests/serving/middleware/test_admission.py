import pytest
from tomoe_serving.admission.controller import AdmissionController
from tomoe_serving.middleware.admission import AdmissionMiddleware, count_sequences
from tomoe_serving.middleware.body import BodyMiddleware
from tomoe_serving.server.state import ServerState

from tests.helpers.asgi import ask, echo


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
def test_sequences_of_a_request_are_counted(body, sequences):
    assert count_sequences(body) == sequences


def _admission_layer(app=echo, *, queue_size=2, **fields):
    admission = AdmissionController(max_sequences=1, queue_size=queue_size)
    layer = AdmissionMiddleware(app, state=ServerState(is_warm=True, **fields), admission=admission)
    return BodyMiddleware(layer, max_bytes=10_000, timeout=9, max_tokens=9), layer


@pytest.mark.parametrize(("fields", "said"), [({"is_draining": True}, "stopping"), ({"is_dead": True}, "died")])
def test_stopping_or_dead_server_refuses_with_retry_after(fields, said):
    app, layer = _admission_layer(drain_timeout=12, **fields)
    response = ask(app, json={})
    assert response.status_code == 503
    assert response.headers["retry-after"] == "12"
    assert said in response.json()["error"]["message"]
    assert ask(app, "GET", "/health").status_code == 200
    assert not layer.state.is_ready


def test_full_queue_is_a_429_and_keeps_no_entry():
    app, layer = _admission_layer()
    with layer.admission.enqueue(3):
        response = ask(app, json={"prompt": "a"})
        assert ask(app, "POST", "/tokenize", json={}).status_code == 200
    assert response.status_code == 429
    assert int(response.headers["retry-after"]) >= 1
    assert layer.state.refusals["queue_full"] == 1
    assert ask(app, json={"prompt": "a"}).status_code == 200
    assert layer.admission.pending == layer.state.generating == 0


def test_request_larger_than_the_queue_is_a_400():
    app, _ = _admission_layer()
    assert ask(app, json={"prompt": ["a"] * 4}).status_code == 400
