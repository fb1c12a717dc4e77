"""Which experts a worker's tokens took, counted at next to no cost. Off unless asked for.

``--additional-config '{"tomoe_expert_statistics": true}'`` asks: then every gate leaves its expert ids in a static
buffer, inside the op that routes, so CUDA graphs and torch.compile keep it (vLLM's compile cache knows the setting).
After a step the rows of its real tokens are copied, all layers at once, and counted on the host, many steps together:
with the caches full of weights, a numpy call after a step costs ten times what it costs in a row of them. Padding lies
behind the real tokens; vLLM's warm-up and dummy runs do not pass the place where steps are read
(``worker_extension.py``).

On a GPU the rows travel to pinned memory behind an event and are counted when they have arrived: nothing waits in the
forward pass. (The GPU side has never run: no GPU here.)
"""

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.model_executor.models.utils import extract_layer_index

from tomoe_vllm.layers.mlp.router import STATISTICS_SETTING, ToMoERouter

UNION_STEPS = 64
"""Over about so many recent steps the union of neurons is averaged: a step has one union, and one alone says little."""

BATCH_STEPS = 32
BATCH_TOKENS = 4096
"""So many steps, or tokens, are counted together, unless somebody asks before."""


@dataclass(kw_only=True, slots=True)
class ExpertCounts:
    """Counts of one worker since the start. L layers of this worker, N experts, F neurons of this rank.

    ``signatures``: [L, F, ceil(N / 8)] uint8, which experts keep a neuron. ``tokens``: [L, N] int64, tokens per expert.
    ``union_neurons``: [L] float64, neurons that a step touches (the union over its tokens' experts), averaged with
    weight 1 / UNION_STEPS for the last step. ``step_paths``: steps by the way they took through the weights.
    """

    signatures: np.ndarray
    num_experts: int
    tokens: np.ndarray = field(init=False)
    union_neurons: np.ndarray = field(init=False)
    num_steps: int = 0
    num_tokens: int = 0
    step_paths: Counter[str] = field(default_factory=Counter)
    _offsets: np.ndarray = field(init=False)
    _union_size: Callable[[int, bytes], int] = field(init=False)

    def __post_init__(self) -> None:
        num_layers = len(self.signatures)
        self.tokens = np.zeros((num_layers, self.num_experts), dtype=np.int64)
        self.union_neurons = np.zeros(num_layers)
        self._offsets = np.arange(num_layers)[:, None] * self.num_experts
        # A step of few tokens meets the same few sets of experts again and again.
        self._union_size = lru_cache(maxsize=65_536)(self._count_union)

    def _count_union(self, layer: int, experts: bytes) -> int:
        """Neurons of ``layer`` that any of ``experts`` (bits, as in the signature) keeps."""
        is_touched = self.signatures[layer] & np.frombuffer(experts, dtype=np.uint8)
        return int(is_touched.any(axis=1).sum())

    def add(self, steps: list[np.ndarray]) -> None:
        """Count some steps, in their order. ``steps``: of each its real tokens, [L, T] uint8."""
        num_layers, num_steps = len(self.tokens), len(steps)
        expert_ids = np.concatenate(steps, axis=1)
        flat = (expert_ids + self._offsets).ravel()
        self.tokens += np.bincount(flat, minlength=self.tokens.size).reshape(self.tokens.shape)
        self.num_tokens += expert_ids.shape[1]
        step_of_token = np.repeat(np.arange(num_steps), [step.shape[1] for step in steps])
        is_used = np.zeros((num_steps, num_layers, self.num_experts), dtype=bool)
        is_used[step_of_token, np.arange(num_layers)[:, None], expert_ids] = True
        experts = np.packbits(is_used, axis=2, bitorder="little")
        num_bytes = experts.shape[2]
        for step in range(num_steps):
            bits = experts[step].tobytes()
            unions = [self._union_size(i, bits[i * num_bytes : (i + 1) * num_bytes]) for i in range(num_layers)]
            self.num_steps += 1
            self.union_neurons += (np.array(unions) - self.union_neurons) / min(self.num_steps, UNION_STEPS)


@dataclass(kw_only=True, slots=True)
class UncountedStep:
    """``expert_ids``: [L, T] uint8, on the host once ``arrived`` has (None: it is there)."""

    expert_ids: Tensor | np.ndarray
    arrived: torch.cuda.Event | None
    num_padded_tokens: int
    consume: Callable[[np.ndarray], None] | None

    def is_there(self, waits: bool) -> bool:
        if self.arrived is None or self.arrived.query():
            return True
        if waits:
            self.arrived.synchronize()
        return waits


class ExpertRecorder:
    """Reads the gates' records of a model after each step, and counts them.

    Raises ``ValueError`` (with what to do) for a model without gates or whose gates do not record.
    """

    def __init__(self, model: nn.Module) -> None:
        mlps = [mlp for mlp in model.modules() if isinstance(getattr(mlp, "expert_gate", None), ToMoERouter)]
        gates = [mlp.expert_gate for mlp in mlps]
        if not gates:
            raise ValueError("this model has no expert gates: it is not a ToMoE checkpoint")
        records = [gate.record for gate in gates if gate.record is not None]
        if len(records) < len(gates):
            raise ValueError(
                f"expert statistics are off; start vLLM with --additional-config '{{\"{STATISTICS_SETTING}\": true}}'"
            )
        self.first_layer = extract_layer_index(gates[0].prefix)
        self.num_experts = gates[0].num_experts
        self.records: list[Tensor] = records
        signatures = np.stack([gate.signature.detach().cpu().numpy() for gate in gates])
        self.counts = ExpertCounts(signatures=signatures, num_experts=self.num_experts)
        self._mlp: Any = mlps[0]
        self._host_records = [record.numpy() for record in records] if records[0].device.type == "cpu" else None
        self._uncounted: deque[UncountedStep] = deque()
        self._num_uncounted_tokens = 0

    def read_step(
        self, num_tokens: int, num_padded_tokens: int, consume: Callable[[np.ndarray], None] | None = None
    ) -> None:
        """Copy the rows of the step that has just been launched; they are counted with those of other steps.

        ``num_padded_tokens``: rows that the layers saw. ``consume``: gets the step's [L, T] uint8 too, then.
        """
        expert_ids, arrived = self._copy(num_tokens)
        step = UncountedStep(
            expert_ids=expert_ids, arrived=arrived, num_padded_tokens=num_padded_tokens, consume=consume
        )
        self._uncounted.append(step)
        self._num_uncounted_tokens += num_tokens
        if len(self._uncounted) >= BATCH_STEPS or self._num_uncounted_tokens >= BATCH_TOKENS:
            self.settle(waits=False)

    def _copy(self, num_tokens: int) -> tuple[Tensor | np.ndarray, torch.cuda.Event | None]:
        if self._host_records is not None:
            return np.stack([record[:num_tokens] for record in self._host_records]), None
        on_device = torch.stack([record[:num_tokens] for record in self.records])
        on_host = torch.empty(on_device.shape, dtype=torch.uint8, pin_memory=True)
        on_host.copy_(on_device, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return on_host, arrived

    def settle(self, *, waits: bool = True) -> None:
        """Count what has arrived; ``waits``: all there is."""
        steps = []
        while self._uncounted and self._uncounted[0].is_there(waits):
            step = self._uncounted.popleft()
            expert_ids = np.asarray(step.expert_ids)
            steps.append(expert_ids)
            self.counts.step_paths[self._mlp.step_path(step.num_padded_tokens)] += 1
            if step.consume is not None:
                step.consume(expert_ids)
        if steps:
            self.counts.add(steps)
            self._num_uncounted_tokens -= sum(step.shape[1] for step in steps)
