"""Life cycle of the server: start, ready, draining, end.

- Start: the port is bound at once but accepts connections only after the engine has generated a token. A checkpoint
  that cannot be served therefore ends the process before a client connects.
- SIGTERM or Ctrl-C: new requests get 503, open ones have ``drain_timeout`` seconds. Those still open then are aborted,
  and their streams get a last chunk.
- Death of the engine: readiness is off at once, open requests get an error, and the process exits with 1, so that a
  supervisor restarts it.
"""

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import uvloop

from tomoe_serving.admission.calibration import measure_step_times
from tomoe_serving.admission.controller import AdmissionController
from tomoe_serving.admission.step_time import Limits, Profile, StepTimes, limits_for
from tomoe_serving.api.compute_budget import admitted_source, cost_of
from tomoe_serving.api.experts import ENGINE_ARGUMENTS
from tomoe_serving.api.server_metrics import register_metrics
from tomoe_serving.server import engine
from tomoe_serving.server.app import add_layers, build_app
from tomoe_serving.server.listen import FLUSH_SECONDS, Server, bind, make_server
from tomoe_serving.server.logs import configure_logging
from tomoe_serving.server.memory import require_memory
from tomoe_serving.server.settings import ServerSettings
from tomoe_serving.server.state import ServerState

logger = logging.getLogger(__name__)

WATCH_SECONDS = 0.05
"""Interval of the check whether the engine has died. vLLM has no event for it; the check reads one attribute."""


def run_server(settings: ServerSettings, facts: dict[str, Any]) -> int:
    """Serve until a signal or the engine's death; returns the exit code.

    Args:
        facts: the checkpoint's, as ``tomoe inspect`` prints them.

    Raises ``ValueError`` for what cannot be served, ``OSError`` for a port that cannot be bound.
    """
    configure_logging(settings.log_format, settings.log_level)
    signal.signal(signal.SIGTERM, _interrupt)  # while loading, when the event loop is busy
    with bind(settings.host, settings.port) as sock:
        return uvloop.run(_serve(settings, facts, sock))  # as vllm serve does


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


async def _serve(settings: ServerSettings, facts: dict[str, Any], sock: socket.socket) -> int:
    async with _measured_engine(settings, facts) as (client, args, times):
        limits = engine.step_limits(client)
        state = ServerState(drain_timeout=settings.drain_timeout)
        admission = AdmissionController(
            max_sequences=limits.max_sequences,
            queue_size=settings.queue_size,
            times=times,
            slo_ms=settings.tpot_slo_ms,
            kv_capacity=engine.kv_capacity(client),
        )
        await _generate_one(client)
        client.admission = admission
        state.is_warm = True
        vllm_app = await engine.build_openai_app(client, args)
        cost = cost_of(facts, engine.parameter_bytes(client, facts), engine.kv_value_bytes(client))
        budget = admitted_source(
            args.served_model_name[0],
            cost,
            admission,
            state,
            max_step_tokens=limits.max_step_tokens,
            kv_tokens=engine.kv_capacity(client),
            kv_usage=lambda: client.kv_usage.share,
        )
        register_metrics(budget)
        app = add_layers(
            build_app(vllm_app, settings=settings, state=state, budget=budget, engine_client=client),
            settings=settings,
            state=state,
            admission=admission,
            active_parameters=cost.active_parameters,
            max_model_len=client.model_config.max_model_len,
        )
        return await Lifecycle(client, state, admission, make_server(app, settings)).run(sock)


@contextlib.asynccontextmanager
async def _measured_engine(
    settings: ServerSettings, facts: dict[str, Any]
) -> AsyncIterator[tuple[engine.AdmittingLLM, Any, StepTimes | None]]:
    """An engine, its arguments and its step times.

    With an SLO the engine's limits follow from the step times, and vLLM takes limits only when it starts. Without a
    profile a first engine is therefore started for the measurement, and a second one serves.
    """
    slo = settings.tpot_slo_ms
    profile = _stored_profile(settings, facts)
    if slo and not profile and not settings.measure:
        raise ValueError("--tpot-slo-ms needs measured step times: omit --no-measure, or give a --profile")
    if slo and not profile:
        async with _engine(settings, facts, None) as (client, _):
            profile = await _measure(client, settings, facts)
    limits = None
    if slo and profile:
        limits = limits_for(
            profile.times, slo, max_sequences=profile.times.decode[-1][0], max_step_tokens=profile.times.prefill[-1][0]
        )
        logger.info(
            "%g ms per token: at most %d sequences, %d tokens per step",
            slo,
            limits.max_sequences,
            limits.max_step_tokens,
        )
    async with _engine(settings, facts, limits) as (client, args):
        if not profile and settings.measure:
            profile = await _measure(client, settings, facts)
        yield client, args, profile.times if profile else None


def _stored_profile(settings: ServerSettings, facts: dict[str, Any]) -> Profile | None:
    if settings.profile is None or not settings.profile.exists():
        return None
    profile = Profile.read(settings.profile)
    profile.require(engine.profile_key(settings, facts), settings.profile)
    return profile


@contextlib.asynccontextmanager
async def _engine(settings: ServerSettings, facts: dict[str, Any], limits: Limits | None):
    defaults = ENGINE_ARGUMENTS if settings.expert_statistics else {}
    args = engine.parse_engine_args(settings, defaults, limits)
    require_memory(settings.checkpoint, engine.memory_needed(args, facts), engine.memory_available())
    async with engine.start_engine(args) as client:
        yield client, args


async def _measure(client: engine.AdmittingLLM, settings: ServerSettings, facts: dict[str, Any]) -> Profile:
    limits = engine.step_limits(client)
    times = await measure_step_times(
        engine.token_stream(client),
        vocab_size=client.model_config.get_vocab_size(),
        max_sequences=limits.max_sequences,
        max_step_tokens=limits.max_step_tokens,
        max_model_len=client.model_config.max_model_len,
        enough_ms=settings.tpot_slo_ms,
    )
    profile = Profile(engine.profile_key(settings, facts), times)
    if settings.profile is not None:
        profile.write(settings.profile)
    return profile


async def _generate_one(client: engine.AdmittingLLM) -> None:
    async for _ in engine.token_stream(client)([1], 1):
        pass


@dataclass
class Lifecycle:
    """Runs the server until a signal or the engine's death ends it."""

    client: engine.AdmittingLLM
    state: ServerState
    admission: AdmissionController
    server: Server
    _signal: int = 0
    _abort_now: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, sock: socket.socket) -> int:
        """Serve; returns the exit code: 0 after SIGTERM, 130 after Ctrl-C, 1 if the engine died."""
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, stop, number)
        serving = asyncio.create_task(self.server.serve(sockets=[sock]))
        host, port = sock.getsockname()[:2]
        logger.info("ready on %s:%d", host, port, extra={"host": host, "port": port})
        watching = asyncio.create_task(self._death())
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({serving, watching, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if stopping.done() and not watching.done():
            await self._drain(watching)
        if watching.done():
            await self._die()
        watching.cancel()
        stopping.cancel()
        self.server.should_exit = True
        await serving
        if self.state.is_dead:
            return 1
        return 130 if self._signal == signal.SIGINT else 0

    def _stop(self, stop: asyncio.Event, number: int) -> None:
        if stop.is_set():
            self._abort_now.set()
        self._signal = number
        self.state.is_draining = True
        stop.set()

    async def _death(self) -> None:
        while not self.client.errored:
            await asyncio.sleep(WATCH_SECONDS)

    async def _drain(self, watching: asyncio.Task[None]) -> None:
        """Wait for open requests; abort those left at the deadline or at a second signal."""
        logger.info("draining: %d requests are open", self.state.generating)
        abort = asyncio.create_task(self._abort_now.wait())
        idle = asyncio.create_task(self._until_idle())
        timeout = self.state.drain_timeout
        await asyncio.wait({abort, idle, watching}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if not idle.done() and not watching.done():
            logger.warning("aborting %d requests", self.state.generating)
            self.admission.close()
            await self.client.abort_all()
            await asyncio.wait({idle}, timeout=FLUSH_SECONDS)
        for task in (abort, idle):
            task.cancel()

    async def _die(self) -> None:
        """Wait until open requests have got their errors. An exit of the engine after the last one is no error."""
        if self.state.is_draining and not self.state.generating:
            return
        self.state.is_dead = True
        logger.error("the engine has died; %d requests are open", self.state.generating)
        self.admission.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._until_idle(), FLUSH_SECONDS)

    async def _until_idle(self) -> None:
        while self.state.generating:
            await asyncio.sleep(WATCH_SECONDS)
