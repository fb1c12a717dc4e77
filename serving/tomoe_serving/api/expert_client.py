"""Reads expert statistics from vLLM's workers, at a limited rate so that requests for them cannot slow the engine.

A read is one ``collective_rpc``, which the engine handles between two steps. One runs at a time. Counts are read at
most once a second, the same part of a trace at most five times; in between the last result is returned.
"""

import asyncio
import logging
import time
from collections import OrderedDict
from typing import Any

from tomoe_serving.api.expert_reports import ExpertReport, ExpertTrace, merge_counts, merge_trace

logger = logging.getLogger(__name__)

COUNTS_AGE_S = 1.0
TRACE_AGE_S = 0.2
RPC_TIMEOUT_S = 5.0
"""A worker that prefills a long prompt responds only when that step is done."""
KEPT_TRACES = 64


class ExpertsUnavailableError(Exception):
    """There is nothing to report; the message is the reason. ``status``: 404 if statistics are off, 503 to retry."""

    def __init__(self, message: str, status: int = 404) -> None:
        super().__init__(message)
        self.status = status


class ExpertClient:
    """``engine_client``: vLLM's; only its ``collective_rpc`` is used. ``None`` if there is no engine."""

    def __init__(self, engine_client: Any) -> None:
        self._engine = engine_client
        self._lock = asyncio.Lock()
        self._is_started = False
        self._unavailable: str | None = None
        self._report: tuple[float, ExpertReport] | None = None
        self._traces: OrderedDict[tuple[str, int], tuple[float, ExpertTrace | None]] = OrderedDict()

    async def start(self) -> None:
        """Make the workers count. Raises :class:`ExpertsUnavailableError` if they cannot."""
        if self._unavailable is not None:
            raise ExpertsUnavailableError(self._unavailable)
        if self._is_started:
            return
        try:
            answers = await self._call("tomoe_start_experts")
        except ExpertsUnavailableError:
            raise
        except Exception as error:  # the type depends on the executor
            if "tomoe_start_experts" not in str(error):
                raise ExpertsUnavailableError(f"the engine does not respond: {error}", 503) from error
            answers = ["expert statistics are off: the workers have no ToMoE extension (--worker-extension-cls)"]
        self._unavailable = next((answer for answer in answers if answer is not None), None)
        if self._unavailable is not None:
            logger.warning("expert statistics are unavailable: %s", self._unavailable)
            raise ExpertsUnavailableError(self._unavailable)
        self._is_started = True

    async def report(self) -> ExpertReport:
        """Counts of all workers, at most a second old, or older while a long step runs.

        Raises :class:`ExpertsUnavailableError`.
        """
        async with self._lock:
            if self._report is None or time.monotonic() - self._report[0] > COUNTS_AGE_S:
                try:
                    await self.start()
                    report = merge_counts(await self._call("tomoe_expert_counts"))
                except ExpertsUnavailableError as error:
                    if self._report is None or error.status == 404:
                        raise
                else:
                    self._report = (time.monotonic(), report)
            return self._report[1]

    async def trace(self, trace_id: str, start: int) -> ExpertTrace | None:
        """The experts of a request's tokens from position ``start`` on, or None.

        Raises :class:`ExpertsUnavailableError`.
        """
        async with self._lock:
            key = (trace_id, start)
            known = self._traces.get(key)
            if known is not None and time.monotonic() - known[0] < TRACE_AGE_S:
                return known[1]
            await self.start()
            trace = merge_trace(trace_id, start, await self._call("tomoe_expert_trace", (trace_id, start)))
            self._traces[key] = (time.monotonic(), trace)
            self._traces.move_to_end(key)
            while len(self._traces) > KEPT_TRACES:
                self._traces.popitem(last=False)
            return trace

    async def _call(self, method: str, arguments: tuple = ()) -> list[Any]:
        if self._engine is None:
            raise ExpertsUnavailableError("the engine is not ready yet; retry", 503)
        try:
            return await asyncio.wait_for(self._engine.collective_rpc(method, args=arguments), RPC_TIMEOUT_S)
        except TimeoutError:
            raise ExpertsUnavailableError("the engine is in a long step; retry", 503) from None
