"""``GET /v1/tomoe/budget``: cost of a token, measured step times, capacity, and what is in use now."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel

from tomoe_serving.admission.controller import AdmissionController
from tomoe_serving.admission.step_time import StepTimes
from tomoe_serving.server.state import ServerState

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a cache value in a checkpoint's dtype, by which ``tomoe inspect`` counts the KV cache."""


class Cost(BaseModel):
    """Cost of one token, the same for every token.

    Active parameters are the method's count. read_parameters_per_token is what each layout of the experts reads,
    kv_bytes_per_token what each layout of the KV cache stores (docs/serving.md). The engine's log names the layouts
    that are in use.
    """

    active_parameters: int
    total_parameters: int
    active_ratio: float
    flops_per_token: int
    weight_bytes_per_token: int
    read_parameters_per_token: dict[str, int]
    kv_bytes_per_token: dict[str, int]


class Curve(BaseModel):
    """Measured step times: [sequences, ms] of decoding, [prompt tokens, ms] of prefill."""

    decode: list[tuple[int, float]]
    prefill: list[tuple[int, float]]
    kv_ms_per_token: float


class Capacity(BaseModel):
    """What can run at once. tokens_per_s is null without a measurement, queue_size under bare vLLM (no limit)."""

    max_sequences: int
    max_step_tokens: int
    queue_size: int | None
    kv_tokens: int
    tpot_slo_ms: float | None
    tokens_per_s: float | None


class InUse(BaseModel):
    """What is in use now. Values of the admission are null under bare vLLM.

    kv_usage: share of the cache's blocks, 0 to 1; kv_reserved_tokens: what the running sequences can come to need.
    """

    running: int
    waiting: int | None = None
    refused: dict[str, int] = {}
    kv_usage: float | None = None
    kv_reserved_tokens: int | None = None
    observed_tpot_ms: float | None = None
    is_draining: bool = False


class Budget(BaseModel):
    """Response of ``GET /v1/tomoe/budget``."""

    model: str
    cost: Cost
    step_time: Curve | None
    capacity: Capacity
    in_use: InUse


@dataclass(frozen=True)
class BudgetSource:
    """What the budget is read from: constants, and functions for what changes."""

    model: str
    cost: Cost
    times: StepTimes | None
    capacity: Callable[[], Capacity]
    in_use: Callable[[], InUse]

    def read(self) -> Budget:
        """The budget now."""
        times = self.times
        curve = None
        if times is not None:
            decode, prefill = list(times.decode), list(times.prefill)
            curve = Curve(decode=decode, prefill=prefill, kv_ms_per_token=times.kv_ms_per_token)
        return Budget(model=self.model, cost=self.cost, step_time=curve, capacity=self.capacity(), in_use=self.in_use())


def admitted_source(
    model: str,
    cost: Cost,
    admission: AdmissionController,
    state: ServerState,
    *,
    max_step_tokens: int,
    kv_tokens: int,
    kv_usage: Callable[[], float],
) -> BudgetSource:
    """The source of ``tomoe serve``."""

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
            refused=state.refusals,
            kv_usage=kv_usage(),
            kv_reserved_tokens=admission.slots.kv_reserved,
            observed_tpot_ms=admission.means.tpot_ms,
            is_draining=state.is_draining,
        )

    return BudgetSource(model, cost, admission.times, capacity, in_use)


def cost_of(facts: dict[str, Any], parameter_bytes: float, kv_value_bytes: int) -> Cost:
    """Cost of a token, from the facts of ``tomoe inspect`` and the sizes of the values that the engine stores."""
    layouts = facts["read_parameters_per_token"]
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
    """The route. ``source`` is called at each request, so it may be set after the routes are added."""
    router = APIRouter(tags=["tomoe"])

    @router.get("/v1/tomoe/budget", response_model=Budget)
    async def budget() -> Budget:
        """Cost of a token, measured step times, capacity, and what is in use now."""
        return source().read()

    return router
