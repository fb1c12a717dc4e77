import logging

import pytest
from tomoe_serving.middleware.request_log import RequestLogMiddleware

from tests.helpers.asgi import ask, echo


def test_body_is_logged_only_with_log_prompts(caplog):
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
def test_invalid_request_id_is_replaced(given):
    got = ask(RequestLogMiddleware(echo), headers={"x-request-id": given}).headers["x-request-id"]
    assert len(got) == 32
