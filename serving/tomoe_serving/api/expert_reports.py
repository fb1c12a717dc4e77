"""What the workers counted, put together: one report for the whole model, in the form that the API answers.

Every worker answers about its own layers (pipeline parallelism) and its own share of the neurons (tensor parallelism).
Tokens are the same on all ranks of a layer and are taken from the first; neurons are added up.
"""

from collections.abc import Iterable
from itertools import groupby
from typing import Any

from pydantic import BaseModel, Field

NOT_COMPUTED = 255
"""What a worker writes for a token that the prefix cache had."""


class ExpertReport(BaseModel):
    """Counts since the server started, of every token that was computed: prompts, answers, tokens computed again."""

    num_layers: int
    num_experts: int
    num_steps: int = Field(description="Forward passes of the model")
    num_tokens: int = Field(description="Tokens that passed the model")
    tokens: list[list[int]] = Field(description="Tokens of each layer and expert: [layers][experts]")
    load_imbalance: list[float | None] = Field(
        description="Most tokens of an expert over the mean, per layer: 1 is even, the number of experts is one for "
        "all; null before the first token"
    )
    neuron_union_ratio: list[float] = Field(
        description="Share of a layer's neurons that a step touches, averaged over about 64 recent steps"
    )
    step_paths: dict[str, int] = Field(description="Steps by the way they took through the MLP's weights")


class ExpertTrace(BaseModel):
    """The experts of one request's tokens, from position ``start`` on."""

    id: str
    start: int
    num_prompt_tokens: int
    num_cached_tokens: int = Field(description="Tokens at the start that the prefix cache had: they were not computed")
    num_tokens: int = Field(description="Positions seen so far; the last token of an answer is never fed back")
    is_finished: bool
    experts: list[list[int] | None] = Field(
        description="For each position the expert at each layer; null where the token was not computed"
    )


def _stages(answers: Iterable[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Answers by pipeline stage in the order of the layers, each in the order of its ranks."""
    ordered = sorted(answers, key=lambda answer: (answer["first_layer"], answer["tensor_parallel_rank"]))
    return [list(ranks) for _, ranks in groupby(ordered, key=lambda answer: answer["first_layer"])]


def _row(part: dict[str, Any], index: int) -> bytes:
    width = part["num_layers"]
    return part["experts"][index * width : (index + 1) * width]


def imbalance(tokens: list[int]) -> float | None:
    """Most tokens of an expert over the mean; None without tokens."""
    total = sum(tokens)
    return max(tokens) * len(tokens) / total if total else None


def merge_counts(answers: Iterable[dict[str, Any]]) -> ExpertReport:
    """One report of all workers' ``tomoe_expert_counts``."""
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
    """One trace of all workers' ``tomoe_expert_trace``; None if no worker knows the id.

    Stages of a pipeline may be a step apart: what all of them have is answered.
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
