"""Many clients: no response is mixed up or lost, no resource leaks, and requests that do not fit get 429."""

import json
import socket

import pytest

from tests.helpers.servers import eventually, in_threads

pytestmark = pytest.mark.engine

BODY = {"model": "tiny-tomoe", "temperature": 0, "ignore_eos": True}


def test_disconnected_clients_leave_no_sequence_and_no_kv_block(server):
    def disconnect(index: int) -> None:
        body = json.dumps(BODY | {"prompt": f"w{index % 90}", "max_tokens": 250, "stream": index % 2 == 0}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            sock.sendall(head.encode() + body)
            sock.settimeout(60)
            if index % 2 == 0:
                sock.recv(200)

    in_threads(100, disconnect)

    def is_idle() -> bool:
        use = server.budget()["in_use"]
        return use["running"] == use["waiting"] == 0 and use["kv_usage"] == 0

    eventually(is_idle, what="no sequence and no KV block in use")
    with server.client() as client:
        metrics = client.get("/metrics").text
    usage = [line for line in metrics.splitlines() if line.startswith("vllm:kv_cache_usage_perc")]
    assert all(float(line.split()[-1]) == 0 for line in usage)


def test_every_response_is_that_of_its_prompt_or_a_429(server):
    prompts = [f"w{i} w{(7 * i) % 90} w{(3 * i + 1) % 90}" for i in range(60)]

    def ask(prompt: str):
        with server.client() as client:
            return client.post("/v1/completions", json=BODY | {"prompt": prompt, "max_tokens": 60})

    answers = in_threads(len(prompts), lambda index: ask(prompts[index]))
    assert {answer.status_code for answer in answers} <= {200, 429}
    served = {p: a.json()["choices"][0]["text"] for p, a in zip(prompts, answers, strict=True) if a.status_code == 200}
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(served) >= 24, "16 slots and a queue of 8"
    for answer in refused:
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["type"] == "RateLimitError"
    assert len(set(served.values())) > len(served) // 2, "the prompts have too few different answers"
    for prompt, text in served.items():
        assert ask(prompt).json()["choices"][0]["text"] == text
    assert server.budget()["in_use"]["refused"]["queue_full"] >= len(refused)
