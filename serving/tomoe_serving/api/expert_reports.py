"""Merges the counts of all workers into one report of the model: the response models of the API.

Each worker has its own layers (pipeline parallelism) and its own share of the neurons (tensor parallelism). Token
counts are the same on all ranks of a layer and are taken from the first; neuron counts are added up.
"""

from collections.abc import Iterable
from itertools import groupby
from typing import Any

from pydantic import BaseModel, Field

NOT_COMPUTED = 255
"""Value in a worker's trace for a token found in the prefix cache."""


class ExpertReport(BaseModel):
    """Counts of all tokens computed since the server started: prompts, outputs, recomputation after preemption."""

    num_layers: int
    num_experts: int
    num_steps: int = Field(description="Forward passes of the model")
    num_tokens: int = Field(description="Tokens computed")
    tokens: list[list[int]] = Field(description="Tokens of each layer and expert: [layers][experts]")
    load_imbalance: list[float | None] = Field(
        description="Tokens of the busiest expert over the mean, per layer. 1 is balanced; the number of experts if "
        "one expert has all tokens; null before the first token"
    )
    neuron_union_ratio: list[float] = Field(
        description="Share of a layer's neurons that a step uses, averaged over about 64 recent steps"
    )
    step_paths: dict[str, int] = Field(description="Forward passes by execution path of the MLP")


class ExpertTrace(BaseModel):
    """The experts of one request's tokens, from position ``start`` on."""

    id: str
    start: int
    num_prompt_tokens: int
    num_cached_tokens: int = Field(description="Tokens at the start found in the prefix cache and not computed")
    num_tokens: int = Field(description="Positions computed so far; the last output token is never fed back")
    is_finished: bool
    experts: list[list[int] | None] = Field(
        description="The expert of each position at each layer; null for a token that was not computed"
    )


def _stages(answers: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Responses by pipeline stage, in the order of layers and ranks."""
    ordered = sorted(answers, key=lambda answer: (answer["first_layer"], answer["tensor_parallel_rank"]))
    return [list(ranks) for _, ranks in groupby(ordered, key=lambda answer: answer["first_layer"])]


def _row(part: dict[str, Any], index: int) -> bytes:
    width = part["num_layers"]
    return part["experts"][index * width : (index + 1) * width]


def imbalance(tokens: list[int]) -> float | None:
    """Tokens of the busiest expert over the mean; ``None`` without tokens."""
    total = sum(tokens)
    return max(tokens) * len(tokens) / total if total else None


def merge_counts(answers: Iterable[dict[str, Any]]) -> ExpertReport:
    """Merge the workers' ``tomoe_expert_counts``."""
    stages = _stages(answers)
    first = stages[0][0]
    tokens = [row for ranks in stages for row in ranks[0]["tokens"]]
    ratios = []
    for ranks in stages:
        num_neurons = sum(answer["num_neurons"] for answer in ranks)
        unions = zip(*(answer["union_neurons"] for answer in ranks), strict=True)
        ratios += [sum(union) / num_neurons for union in unions]
    return ExpertReport(
        num_layers=len(tokens),
        num_experts=first["num_experts"],
        num_steps=first["num_steps"],
        num_tokens=first["num_tokens"],
        tokens=tokens,
        load_imbalance=[imbalance(row) for row in tokens],
        neuron_union_ratio=ratios,
        step_paths=first["step_paths"],
    )


def merge_trace(trace_id: str, start: int, answers: Iterable[dict[str, Any] | None]) -> ExpertTrace | None:
    """Merge the workers' ``tomoe_expert_trace``; ``None`` if no worker has the id.

    Pipeline stages may be a step apart; the trace ends at the last position that all of them have.
    """
    stages = _stages(answer for answer in answers if answer is not None)
    if not stages:
        return None
    parts = [ranks[0] for ranks in stages]
    first = parts[0]
    num_tokens = min(part["num_tokens"] for part in parts)
    rows: list[list[int] | None] = []
    for i in range(max(0, num_tokens - start)):
        row = [expert for part in parts for expert in _row(part, i)]
        rows.append(None if NOT_COMPUTED in row else row)
    return ExpertTrace(
        id=trace_id,
        start=start,
        num_prompt_tokens=first["num_prompt_tokens"],
        num_cached_tokens=first["num_cached_tokens"],
        num_tokens=num_tokens,
        is_finished=all(part["is_finished"] for part in parts),
        experts=rows,
    )
