"""Refuses requests while the server stops, after the engine has died, and when the queue is full."""

from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send

from tomoe_serving.admission.controller import AdmissionController, QueueFullError
from tomoe_serving.middleware.body import DECODED_BODY
from tomoe_serving.middleware.errors import RequestRefusedError, send_error
from tomoe_serving.server.state import ServerState

GENERATION_PATHS = {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"}
ALWAYS_OPEN = {"/health", "/ready", "/metrics"}


class AdmissionMiddleware:
    """Innermost layer around vLLM's app: 503 while draining or dead, 429 when the queue is full, with Retry-After.

    Args:
        admission: its queue holds every request for generation while vLLM's app handles it.
    """

    def __init__(self, app: ASGIApp, *, state: ServerState, admission: AdmissionController) -> None:
        self.app = app
        self.state = state
        self.admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in ALWAYS_OPEN:
            return await self.app(scope, receive, send)
        try:
            self._require_open()
            if scope["method"] != "POST" or scope["path"] not in GENERATION_PATHS:
                return await self.app(scope, receive, send)
            sequences = count_sequences(scope.get(DECODED_BODY))
            largest = self.admission.queue_size + self.admission.max_sequences
            if sequences > largest:
                raise RequestRefusedError(
                    400, f"the request has {sequences} sequences, at most {largest} fit in the queue"
                )
            with self.admission.enqueue(sequences):
                self.state.generating += 1
                try:
                    await self.app(scope, receive, send)
                finally:
                    self.state.generating -= 1
        except QueueFullError as error:
            self.state.refusals["queue_full"] += 1
            wait = {"retry-after": str(error.retry_after_s)}
            message = f"the queue is full: {self.admission.pending} sequences wait; retry after {error.retry_after_s} s"
            await send_error(send, RequestRefusedError(429, message, headers=wait))
        except RequestRefusedError as error:
            await send_error(send, error)

    def _require_open(self) -> None:
        state = self.state
        if not (state.is_dead or state.is_draining):
            return
        state.refusals["engine_dead" if state.is_dead else "draining"] += 1
        reason = "the engine has died and the server restarts" if state.is_dead else "the server is stopping"
        wait = {"retry-after": str(max(1, round(state.drain_timeout))), "connection": "close"}
        raise RequestRefusedError(503, f"{reason}; retry later or on another server", headers=wait)


def count_sequences(body: Any) -> int:
    """Sequences that a request starts: prompts times ``n``. An invalid body counts as one; vLLM refuses it."""
    if not isinstance(body, dict):
        return 1
    prompt, n = body.get("prompt"), body.get("n")
    is_batch = isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list)
    prompts = len(prompt) if isinstance(prompt, list) and is_batch else 1
    return prompts * (n if isinstance(n, int) and n > 0 else 1)
