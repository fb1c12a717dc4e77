"""TLS: the server speaks https only, and invalid files are refused before the checkpoint is read."""

import contextlib
import ssl

import httpx
import pytest
from openai import OpenAI

from tests.helpers.certificates import make_certificate
from tests.serving.conftest import KEY


@pytest.fixture
def certificate(tmp_path):
    return make_certificate(tmp_path)


def _refusal(run_cli, certificate, key) -> str:
    """Error line for a missing checkpoint and these files: the files are checked first."""
    code, out, err = run_cli("serve", "/nowhere/model", "--tls-cert", certificate, "--tls-key", key)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1, err
    assert "/nowhere/model" not in err
    return err


def test_valid_files_are_accepted(run_cli, certificate):
    code, _, err = run_cli("serve", "/nowhere/model", *certificate.flags)
    assert code == 2
    assert "not a model folder" in err


@pytest.mark.parametrize("which", ["certificate", "key"])
def test_missing_file_is_refused(run_cli, certificate, which):
    getattr(certificate, which).unlink()
    assert f"{getattr(certificate, which)} is not a file" in _refusal(run_cli, certificate.certificate, certificate.key)


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: b"\x00damaged", lambda data: data[: len(data) // 2]])
@pytest.mark.parametrize("which", ["certificate", "key"])
def test_damaged_file_is_refused(run_cli, certificate, which, damage):
    file = getattr(certificate, which)
    file.write_bytes(damage(file.read_bytes()))
    said = {"certificate": "is not a PEM certificate", "key": "is not a PEM private key"}[which]
    assert f"{file} {said}" in _refusal(run_cli, certificate.certificate, certificate.key)


def test_key_of_another_certificate_is_refused(run_cli, certificate, tmp_path):
    other = make_certificate(tmp_path, "other").key
    assert f"{other} is not the private key of" in _refusal(run_cli, certificate.certificate, other)


def test_encrypted_key_is_refused_without_a_password_prompt(run_cli, tmp_path):
    locked = make_certificate(tmp_path, "locked", password="secret")
    assert "is encrypted" in _refusal(run_cli, locked.certificate, locked.key)


def test_swapped_files_are_refused(run_cli, certificate):
    assert "is not a PEM certificate" in _refusal(run_cli, certificate.key, certificate.certificate)


@pytest.mark.engine
@pytest.mark.slow
def test_server_responds_over_https_only(served_model, certificate, tmp_path):
    from tests.helpers.servers import run_server

    flags = (*certificate.flags, "--no-measure", "--header-timeout", "1")
    with run_server(served_model, tmp_path / "log", *flags, key=KEY, trust=certificate.trusted()) as server:
        assert server.url.startswith("https://")
        with server.client() as http, OpenAI(base_url=f"{server.url}/v1", api_key=KEY, http_client=http) as client:
            options = {"model": served_model.name, "prompt": "w1", "max_tokens": 6, "temperature": 0}
            whole = client.completions.create(**options).choices[0].text
            streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**options, stream=True))
            assert streamed == whole != ""
            assert http.get("/v1/models", headers={"Authorization": "Bearer wrong"}).status_code == 401
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{server.url}/health", timeout=60)  # a client that does not trust the certificate
        with pytest.raises(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{server.port}/health", timeout=60)
        assert _response_to_unfinished_headers(certificate.trusted(), server.port).startswith(b"HTTP/1.1 408")
        assert "Traceback" not in server.log.read_text()


def _response_to_unfinished_headers(context: ssl.SSLContext, port: int) -> bytes:
    import socket

    with (
        socket.create_connection(("127.0.0.1", port)) as sock,
        context.wrap_socket(sock, server_hostname="127.0.0.1") as secure,
    ):
        secure.settimeout(60)
        secure.sendall(b"GET /health HTTP/1.1\r\nX-A: b\r\n")
        response = b""
        with contextlib.suppress(ssl.SSLEOFError):
            while part := secure.recv(65536):
                response += part
    return response
