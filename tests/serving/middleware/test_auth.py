import pytest
from tomoe_serving.middleware.auth import ApiKeyMiddleware
from tomoe_serving.server.settings import hash_key

from tests.helpers.asgi import ask, echo

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
        ({"Authorization": f"Bearer {KEYS[0]}"}, 401),  # the hash is not a key
        ({"Authorization": b"Bearer \xe9"}, 401),
    ],
)
def test_any_of_several_keys_is_accepted(headers, status):
    response = ask(ApiKeyMiddleware(echo, hashes=KEYS), headers=headers)
    assert response.status_code == status
    if status == 401:
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["type"] == "AuthenticationError"


@pytest.mark.parametrize(("path", "status"), [("/health", 200), ("/", 200), ("/static/page.js", 200), ("/v1", 401)])
def test_probes_and_playground_need_no_key(path, status):
    assert ask(ApiKeyMiddleware(echo, hashes=KEYS), "GET", path).status_code == status


def test_without_keys_no_request_is_refused():
    assert ask(ApiKeyMiddleware(echo, hashes=[])).status_code == 200
