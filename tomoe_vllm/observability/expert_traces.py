"""Keeps the expert of every token of selected requests.

A request selects itself with ``vllm_xargs: {"tomoe_trace": ID}`` (OpenAI API) or ``SamplingParams(extra_args=...)``.
Experts are stored by position in the request, so batching and chunked prefill do not matter, and tokens computed again
after a preemption are stored once. Tokens found in the prefix cache are never computed; they have the value
:data:`NOT_COMPUTED`.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

REQUEST_KEY = "tomoe_trace"
"""Key in a request's extra arguments. The value is an id chosen by the client."""

NOT_COMPUTED = 255

MAX_TRACES = 64
"""Traces kept, running and finished; the oldest is dropped. 64 x 4,096 tokens x 32 layers are 8 MB."""
MAX_TRACE_TOKENS = 4096
"""Positions kept per request. Later tokens are counted in the statistics but not traced."""
MAX_ID_LENGTH = 128


@dataclass(kw_only=True, slots=True)
class Trace:
    """Experts of one request. ``experts``: [at least num_tokens, L] uint8; ``num_tokens``: positions so far."""

    request_id: str
    num_prompt_tokens: int
    num_cached_tokens: int
    experts: np.ndarray
    num_tokens: int = 0
    is_finished: bool = False

    def put(self, start: int, rows: np.ndarray) -> None:
        """Store the experts of the positions from ``start`` on. ``rows``: [T, L] uint8."""
        rows = rows[: max(0, MAX_TRACE_TOKENS - start)]
        end = start + len(rows)
        if end > len(self.experts):
            size = min(max(end, 2 * len(self.experts)), MAX_TRACE_TOKENS)
            grown = np.full((size, self.experts.shape[1]), NOT_COMPUTED, dtype=np.uint8)
            grown[: len(self.experts)] = self.experts
            self.experts = grown
        self.experts[start:end] = rows
        if len(rows):
            self.num_tokens = max(self.num_tokens, end)


@dataclass(kw_only=True, slots=True)
class Step:
    """Rows of a step that belong to traced requests: (trace, first position, first row, number of rows)."""

    slices: list[tuple[Trace, int, int, int]]

    def store(self, expert_ids: np.ndarray) -> None:
        """Store the experts of the traced rows. ``expert_ids``: [L, T] uint8 of the whole step."""
        for trace, position, row, count in self.slices:
            trace.put(position, expert_ids[:, row : row + count].T)


@dataclass(kw_only=True, slots=True)
class ExpertTraces:
    """Traces of one worker. ``num_layers``: layers of this worker."""

    num_layers: int
    _by_id: OrderedDict[str, Trace] = field(default_factory=OrderedDict)
    _running: dict[str, Trace] = field(default_factory=dict)

    def begin_step(self, scheduler_output: Any, request_ids: list[str]) -> Step | None:
        """The rows of this step to store, or None if no traced request is running (the common, cheap case).

        ``scheduler_output``: vLLM's; ``request_ids``: requests in the order of the step's rows.
        """
        for new in scheduler_output.scheduled_new_reqs:
            extra = new.sampling_params.extra_args if new.sampling_params is not None else None
            if extra and isinstance(trace_id := extra.get(REQUEST_KEY), str):
                self._start_trace(trace_id, new)
        if not self._running:
            return None
        for request_id in scheduler_output.finished_req_ids:
            if trace := self._running.pop(request_id, None):
                trace.is_finished = True
        return Step(slices=self._slices(scheduler_output, request_ids))

    def _start_trace(self, trace_id: str, new: Any) -> None:
        if len(trace_id) > MAX_ID_LENGTH or new.req_id in self._running:  # resumed after a preemption
            return
        if trace_id in self._by_id:  # of several choices (n > 1) only the first is traced
            return
        trace = Trace(
            request_id=new.req_id,
            num_prompt_tokens=len(new.prompt_token_ids or ()),
            num_cached_tokens=new.num_computed_tokens,
            experts=np.full((0, self.num_layers), NOT_COMPUTED, dtype=np.uint8),
        )
        self._by_id[trace_id] = self._running[new.req_id] = trace
        while len(self._by_id) > MAX_TRACES:
            _, oldest = self._by_id.popitem(last=False)
            self._running.pop(oldest.request_id, None)

    def _slices(self, scheduler_output: Any, request_ids: list[str]) -> list[tuple[Trace, int, int, int]]:
        cached = scheduler_output.scheduled_cached_reqs
        positions = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        positions |= {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
        slices, row = [], 0
        for request_id in request_ids:
            count = scheduler_output.num_scheduled_tokens[request_id]
            if trace := self._running.get(request_id):
                slices.append((trace, positions[request_id], row, count))
            row += count
        return slices

    def get(self, trace_id: str) -> Trace | None:
        return self._by_id.get(trace_id)
