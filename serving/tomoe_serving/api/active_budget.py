"""``GET /v1/tomoe/budget``: what a token costs, how fast steps are, what is in use now."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from pydantic import BaseModel

from tomoe_serving.admission.controller import Admission
from tomoe_serving.admission.step_time import StepTimes
from tomoe_serving.middleware.admission import Condition

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Of a checkpoint's dtype, in which ``tomoe inspect`` counts the cache."""


class Cost(BaseModel):
    """A token's cost. Active is the method's promise; read is what each layout of the experts really touches.

    kv_bytes_per_token is by layout of the cache (docs/serving.md); which layouts run, the engine's log says.
    """

    active_parameters: int
    total_parameters: int
    active_ratio: float
    flops_per_token: int
    weight_bytes_per_token: int
    read_parameters_per_token: dict[str, int]
    kv_bytes_per_token: dict[str, int]


class Curve(BaseModel):
    """Measured milliseconds: [sequences, ms] of decoding, [prompt tokens, ms] of prefill."""

    decode: list[tuple[int, float]]
    prefill: list[tuple[int, float]]
    kv_ms_per_token: float


class Capacity(BaseModel):
    """What may run at once. tokens_per_s is null without measurement, queue_size under bare vLLM (no bound)."""

    max_sequences: int
    max_step_tokens: int
    queue_size: int | None
    kv_tokens: int
    tpot_slo_ms: float | None
    tokens_per_s: float | None


class InUse(BaseModel):
    """Now. What only the admission knows is null under bare vLLM.

    kv_usage: share of the cache's blocks; kv_reserved_tokens: what the running sequences could come to need.
    """

    running: int
    waiting: int | None = None
    refused: dict[str, int] = {}
    kv_usage: float | None = None
    kv_reserved_tokens: int | None = None
    observed_tpot_ms: float | None = None
    is_draining: bool = False


class Budget(BaseModel):
    """Answer of ``GET /v1/tomoe/budget``."""

    model: str
    cost: Cost
    step_time: Curve | None
    capacity: Capacity
    in_use: InUse


@dataclass(frozen=True)
class BudgetSource:
    """Where the numbers come from: fixed ones as they are, changing ones as functions."""

    model: str
    cost: Cost
    times: StepTimes | None
    capacity: Callable[[], Capacity]
    in_use: Callable[[], InUse]

    def read(self) -> Budget:
        """The budget of this moment."""
        times = self.times
        curve = None
        if times is not None:
            decode, prefill = list(times.decode), list(times.prefill)
            curve = Curve(decode=decode, prefill=prefill, kv_ms_per_token=times.kv_ms_per_token)
        return Budget(model=self.model, cost=self.cost, step_time=curve, capacity=self.capacity(), in_use=self.in_use())


def admitted_source(
    model: str,
    cost: Cost,
    admission: Admission,
    condition: Condition,
    *,
    max_step_tokens: int,
    kv_tokens: int,
    kv_usage: Callable[[], float],
) -> BudgetSource:
    """The source of a server with admission."""

    def capacity() -> Capacity:
        return Capacity(
            max_sequences=admission.max_sequences,
            max_step_tokens=max_step_tokens,
            queue_size=admission.queue_size,
            kv_tokens=kv_tokens,
            tpot_slo_ms=admission.slo_ms,
            tokens_per_s=admission.capacity_tokens_per_s(),
        )

    def in_use() -> InUse:
        return InUse(
            running=admission.running,
            waiting=admission.waiting,
            refused=condition.refusals,
            kv_usage=kv_usage(),
            kv_reserved_tokens=admission.kv_reserved,
            observed_tpot_ms=admission.observed_tpot_ms,
            is_draining=condition.is_draining,
        )

    return BudgetSource(model, cost, admission.times, capacity, in_use)


def cost_of(facts: dict[str, Any], parameter_bytes: float, kv_value_bytes: int) -> Cost:
    """Cost of a token from the facts that ``tomoe inspect`` prints and the sizes that the engine uses."""
    layouts = facts["really_read_per_token"]
    head = layouts["shared"]["lm_head_parameters"]
    active_matrices = facts["active_block_parameters"] + facts["router_parameters"] + head
    parts = ("attention_parameters", "mlp_parameters", "router_parameters", "lm_head_parameters")
    stored_kv = dict(facts["kv_bytes_per_token"])
    stored_bytes = DTYPE_BYTES[stored_kv.pop("dtype")]
    return Cost(
        active_parameters=facts["active_parameters"],
        total_parameters=facts["total_parameters"],
        active_ratio=facts["active_ratio"],
        flops_per_token=2 * active_matrices,
        weight_bytes_per_token=round(active_matrices * parameter_bytes),
        read_parameters_per_token={name: sum(read[part] for part in parts) for name, read in layouts.items()},
        kv_bytes_per_token={name: size // stored_bytes * kv_value_bytes for name, size in stored_kv.items()},
    )


def budget_router(source: Callable[[], BudgetSource]) -> APIRouter:
    """The route; ``source`` is asked at each request, so it may be made after the routes are."""
    router = APIRouter(tags=["tomoe"])

    @router.get("/v1/tomoe/budget", response_model=Budget)
    async def budget() -> Budget:
        """What a token costs, how fast steps are, what is in use now."""
        return source().read()

    return router


class ServerMetrics:
    """Prometheus collector of the same numbers, beside vLLM's own at /metrics."""

    def __init__(self, source: BudgetSource) -> None:
        self.source = source

    def collect(self):
        """Prometheus calls it at each scrape."""
        budget = self.source.read()
        gauges = {
            "tomoe_sequences_running": ("Sequences that have a seat", budget.in_use.running),
            "tomoe_sequences_waiting": ("Sequences that wait for a seat", budget.in_use.waiting),
            "tomoe_sequences_capacity": ("Seats", budget.capacity.max_sequences),
            "tomoe_active_parameters_per_token": ("Parameters that a token uses", budget.cost.active_parameters),
            "tomoe_tpot_slo_ms": ("Time per output token to keep", budget.capacity.tpot_slo_ms),
            "tomoe_tpot_observed_ms": ("Time per output token, recent mean", budget.in_use.observed_tpot_ms),
            "tomoe_capacity_tokens_per_second": ("Modelled output with every seat taken", budget.capacity.tokens_per_s),
        }
        for name, (text, value) in gauges.items():
            if value is not None:
                yield GaugeMetricFamily(name, text, value=float(value))
        refused = CounterMetricFamily("tomoe_requests_refused", "Requests refused, by reason", labels=["reason"])
        for reason, count in budget.in_use.refused.items():
            refused.add_metric([reason], count)
        yield refused


def register_metrics(source: BudgetSource) -> None:
    """Add :class:`ServerMetrics` to the process's registry."""
    REGISTRY.register(ServerMetrics(source))
