"""Invalid requests get the documented status and an OpenAI error body."""

import contextlib
import json
import socket
import time

import httpx
import pytest

pytestmark = pytest.mark.engine

MODEL = "tiny-tomoe"
JSON = {"content-type": "application/json"}


def _is_openai_error(response: httpx.Response) -> bool:
    return {"message", "type", "param", "code"} <= response.json()["error"].keys()


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"model": "tiny-tomoe", "prompt": "w1", "temperature": NaN}', "not valid JSON"),
        (b'{"model": "tiny-tomoe", "prompt": "w1", "temperature": 1e999}', "not valid JSON"),
        (b'{"model": "tiny-tomoe", "prompt": "w1", "max_tokens": 1000000000}', "context holds 256"),
        (b'{"model": "tiny-tomoe", "prompt": ', "not valid JSON"),
        (b'{"model": "tiny-tomoe", "prompt": "\xff\xfe"}', "not valid UTF-8"),
        (b'{"model": "tiny-tomoe", "prompt": "\\ud800"}', "not valid JSON"),
        (b"[" * 5000 + b"]" * 5000, "nested deeper"),
        (b'{"model": "tiny-tomoe", "prompt": "w1", "n": 100}', "sequences"),
        (b'{"model": "tiny-tomoe", "prompt": "w1", "n": 20}', "at most 16"),
        (b'{"model": "tiny-tomoe", "prompt": [123456789]}', "vocabulary"),
        (b"{}", "prompt"),
        (b"", "not valid JSON"),
    ],
)
def test_bad_body_is_a_400(server, body, said):
    with server.client() as client:
        response = client.post("/v1/completions", content=body, headers=JSON)
    assert response.status_code == 400, response.text
    assert _is_openai_error(response)
    assert said in response.json()["error"]["message"]


@pytest.mark.parametrize("is_chunked", [False, True])
def test_large_body_is_a_413(server, is_chunked):
    block = b"x" * 1_000_000
    content = (block for _ in range(50)) if is_chunked else block * 50
    with server.client() as client:
        response = client.post("/v1/completions", content=content, headers=JSON)
    assert response.status_code == 413
    assert _is_openai_error(response)


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nope", 404), ("PUT", "/v1/completions", 405)])
def test_unknown_routes_and_methods_have_an_error_body(server, method, path, status):
    with server.client() as client:
        response = client.request(method, path)
    assert response.status_code == status
    assert _is_openai_error(response)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/tomoe/budget", "/tokenize", "/openapi.json", "/nope"])
def test_all_routes_but_probes_need_the_key(server, path):
    response = httpx.get(server.url + path, timeout=60)
    assert response.status_code == 401
    assert _is_openai_error(response)


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics"])
def test_probes_need_no_key(server, path):
    assert httpx.get(server.url + path, timeout=60).status_code == 200


def _read_to_the_end(sock: socket.socket) -> bytes:
    sock.settimeout(60)
    data = b""
    while part := sock.recv(65536):
        data += part
    return data


def test_slow_headers_end_with_408(server):
    """Sending a header now and then does not keep the connection open."""
    response = b""
    deadline = time.monotonic() + 60
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\n")
        sock.settimeout(0.3)
        while time.monotonic() < deadline and not response:
            sock.sendall(b"X-A: b\r\n")
            with contextlib.suppress(TimeoutError):
                response = sock.recv(65536)
    assert response.startswith(b"HTTP/1.1 408")


def test_silent_connection_is_closed(server):
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        assert _read_to_the_end(sock) == b""


def test_slow_body_ends_with_408(server):
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.key}\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(head.encode() + b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
        response = _read_to_the_end(sock)
    assert response.startswith(b"HTTP/1.1 408")
    assert b"body did not arrive" in response


def test_huge_headers_end_with_431(server):
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\n" + b"X-A: " + b"a" * 100_000)
        assert _read_to_the_end(sock).startswith(b"HTTP/1.1 431")


def test_bytes_that_are_not_http_are_a_400(server):
    with socket.create_connection(("127.0.0.1", server.port)) as sock:
        sock.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        response = _read_to_the_end(sock)
    assert response.startswith(b"HTTP/1.1 400")
    assert json.loads(response.partition(b"\r\n\r\n")[2])["error"]["code"] == 400


def test_request_id_is_kept_logged_and_returned(server):
    with server.client() as client:
        body = {"model": MODEL, "prompt": "w7 w8 w9", "max_tokens": 1}
        response = client.post("/v1/completions", json=body, headers={"X-Request-Id": "my-id.7"})
        other = client.get("/v1/models", headers={"X-Request-Id": "a bad id"})
    assert response.headers["x-request-id"] == "my-id.7"
    assert "my-id.7" in response.json()["id"]
    assert other.headers["x-request-id"] != "a bad id"
    line = next(entry for entry in server.log_lines("tomoe_serving.access") if entry["request_id"] == "my-id.7")
    assert (line["path"], line["status"]) == ("/v1/completions", 200)


def test_log_has_no_prompt_and_no_key(server):
    with server.client() as client:
        body = {"model": MODEL, "prompt": "w11 w12 w13 w14 secret", "max_tokens": 1}
        client.post("/v1/completions", json=body).raise_for_status()
    log = server.log.read_text()
    assert "w13 w14" not in log
    assert server.key not in log


def test_no_cors_by_default(server):
    response = httpx.get(f"{server.url}/health", headers={"Origin": "https://example.org"}, timeout=60)
    assert "access-control-allow-origin" not in response.headers


def test_no_traceback_in_the_log(server):
    assert "Traceback" not in server.log.read_text()
