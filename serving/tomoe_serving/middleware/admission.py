"""Innermost layer before vLLM's app: who gets in while the server drains, is dead, or is full."""

from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from tomoe_serving.admission.controller import Admission, QueueFullError
from tomoe_serving.middleware.body import DECODED_BODY
from tomoe_serving.middleware.errors import RequestRefusedError, send_error

GENERATION_PATHS = {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"}
ALWAYS_OPEN = {"/health", "/ready", "/metrics"}


@dataclass
class Condition:
    """What the whole process is doing. ``generating`` counts open requests that use the engine."""

    is_warm: bool = False
    is_draining: bool = False
    is_dead: bool = False
    generating: int = 0
    drain_timeout: float = 30.0
    refusals: dict[str, int] = field(default_factory=lambda: {"queue_full": 0, "draining": 0, "engine_dead": 0})

    @property
    def is_ready(self) -> bool:
        return self.is_warm and not self.is_draining and not self.is_dead


class Gate:
    """ASGI layer: 503 while draining or dead, 429 when the queue is full, each with Retry-After."""

    def __init__(self, app: ASGIApp, *, condition: Condition, admission: Admission) -> None:
        self.app = app
        self.condition = condition
        self.admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in ALWAYS_OPEN:
            return await self.app(scope, receive, send)
        try:
            self._require_open()
            if scope["method"] != "POST" or scope["path"] not in GENERATION_PATHS:
                return await self.app(scope, receive, send)
            sequences = count_sequences(scope.get(DECODED_BODY))
            if sequences > self.admission.queue_size + self.admission.max_sequences:
                most = self.admission.queue_size + self.admission.max_sequences
                raise RequestRefusedError(400, f"the request asks for {sequences} sequences, at most {most} can wait")
            with self.admission.enter(sequences):
                self.condition.generating += 1
                try:
                    await self.app(scope, receive, send)
                finally:
                    self.condition.generating -= 1
        except QueueFullError as error:
            self.condition.refusals["queue_full"] += 1
            wait = {"retry-after": str(error.retry_after_s)}
            message = f"the server is full and {self.admission.unseated} sequences wait; try again in the given time"
            await send_error(send, RequestRefusedError(429, message, headers=wait))
        except RequestRefusedError as error:
            await send_error(send, error)

    def _require_open(self) -> None:
        condition = self.condition
        if not (condition.is_dead or condition.is_draining):
            return
        condition.refusals["engine_dead" if condition.is_dead else "draining"] += 1
        reason = "the engine has died and the server restarts" if condition.is_dead else "the server is stopping"
        wait = {"retry-after": str(max(1, round(condition.drain_timeout))), "connection": "close"}
        raise RequestRefusedError(503, f"{reason}; try again later or elsewhere", headers=wait)


def count_sequences(body: Any) -> int:
    """Sequences that a request starts: prompts times ``n``. Nonsense counts as one: vLLM refuses it."""
    if not isinstance(body, dict):
        return 1
    prompt, n = body.get("prompt"), body.get("n")
    is_batch = isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list)
    prompts = len(prompt) if isinstance(prompt, list) and is_batch else 1
    return prompts * (n if isinstance(n, int) and n > 0 else 1)
