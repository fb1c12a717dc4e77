"""Counts how many tokens each expert of a worker processed. Off by default.

``--additional-config '{"tomoe_expert_statistics": true}'`` turns it on. Every router then writes its expert ids to a
static buffer, inside the routing op, so it works with CUDA graphs and torch.compile (the setting is part of vLLM's
compile cache key). After a step the rows of its real tokens are copied for all layers at once. They are counted on the
host, many steps together: right after a step the caches are full of weights, and a numpy call takes ten times as long
as in a sequence of such calls. Rows of padding come after the real tokens. vLLM's warm-up and dummy runs do not reach
the code that reads steps (``worker_extension.py``).

On a GPU the rows are copied to pinned memory, followed by an event, and counted once they have arrived. The forward
pass never waits. The GPU code has never run on a GPU.
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
"""Window of the moving average of ``union_neurons``, in steps."""

BATCH_STEPS = 32
BATCH_TOKENS = 4096
"""Pending steps are counted once there are this many steps or tokens, or when counts are requested."""


@dataclass(kw_only=True, slots=True)
class ExpertCounts:
    """Counts of one worker since the start. L layers of this worker, N experts, F neurons of this rank.

    ``signatures``: [L, F, ceil(N / 8)] uint8, bit n of a neuron is set if expert n keeps it.
    ``tokens``: [L, N] int64, tokens per expert.
    ``union_neurons``: [L] float64, number of neurons that any expert of a step's tokens keeps, as a moving average over
    steps with weight 1 / UNION_STEPS for the latest.
    ``step_paths``: number of steps per execution path.
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
        # Steps of few tokens use a small number of distinct expert sets.
        self._union_size = lru_cache(maxsize=65_536)(self._count_union)

    def set_signatures(self, signatures: np.ndarray) -> None:
        """Use other masks for the steps that are added from now on."""
        self.signatures = signatures
        self._union_size.cache_clear()  # type: ignore[attr-defined]

    def _count_union(self, layer: int, experts: bytes) -> int:
        """Number of neurons of ``layer`` that any of ``experts`` keeps; ``experts``: bits, as in the signature."""
        is_touched = self.signatures[layer] & np.frombuffer(experts, dtype=np.uint8)
        return int(is_touched.any(axis=1).sum())

    def add(self, steps: list[np.ndarray]) -> None:
        """Count steps, oldest first. ``steps``: expert ids of each step's real tokens, [L, T] uint8."""
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
class PendingStep:
    """A step that is not counted yet.

    ``expert_ids``: [L, T] uint8, valid on the host once the event ``arrived`` has completed (None: it is valid now).
    ``consume``: called with the expert ids when the step is counted.
    """

    expert_ids: Tensor | np.ndarray
    arrived: torch.cuda.Event | None
    num_padded_tokens: int
    consume: Callable[[np.ndarray], None] | None

    def is_ready(self, *, wait: bool) -> bool:
        """Whether ``expert_ids`` are valid. ``wait``: block until they are."""
        if self.arrived is None or self.arrived.query():
            return True
        if wait:
            self.arrived.synchronize()
        return wait


class ExpertRecorder:
    """Reads the routers' records after each step and counts them.

    Raises ``ValueError``, with what to do, for a model without routers or with routers that do not record.
    """

    def __init__(self, model: nn.Module) -> None:
        mlps = [mlp for mlp in model.modules() if isinstance(getattr(mlp, "expert_gate", None), ToMoERouter)]
        routers = [mlp.expert_gate for mlp in mlps]
        if not routers:
            raise ValueError("this model has no routers: it is not a ToMoE checkpoint")
        records = [router.record for router in routers if router.record is not None]
        if len(records) < len(routers):
            raise ValueError(
                f"expert statistics are off; start vLLM with --additional-config '{{\"{STATISTICS_SETTING}\": true}}'"
            )
        self.first_layer = extract_layer_index(routers[0].prefix)
        self.num_experts = routers[0].num_experts
        self.records: list[Tensor] = records
        self._routers, self._num_loads = routers, routers[0].num_loads
        self.counts = ExpertCounts(signatures=self._signatures(), num_experts=self.num_experts)
        self._mlp: Any = mlps[0]
        self._host_records = [record.numpy() for record in records] if records[0].device.type == "cpu" else None
        self._pending: deque[PendingStep] = deque()
        self._num_pending_tokens = 0

    def _signatures(self) -> np.ndarray:
        return np.stack([router.signature.detach().cpu().numpy() for router in self._routers])

    def read_step(
        self, num_tokens: int, num_padded_tokens: int, consume: Callable[[np.ndarray], None] | None = None
    ) -> None:
        """Copy the records of the step that has just been launched. They are counted later, with other steps.

        ``num_tokens``: real tokens of the step. ``num_padded_tokens``: rows that the layers computed.
        ``consume``: called with the step's expert ids, [L, T] uint8, when they are counted.
        """
        if self._routers[0].num_loads != self._num_loads:  # weights were reloaded since the last step
            self.count_pending()
            self.counts.set_signatures(self._signatures())
            self._num_loads = self._routers[0].num_loads
        expert_ids, arrived = self._copy(num_tokens)
        step = PendingStep(expert_ids=expert_ids, arrived=arrived, num_padded_tokens=num_padded_tokens, consume=consume)
        self._pending.append(step)
        self._num_pending_tokens += num_tokens
        if len(self._pending) >= BATCH_STEPS or self._num_pending_tokens >= BATCH_TOKENS:
            self.count_pending(wait=False)

    def _copy(self, num_tokens: int) -> tuple[Tensor | np.ndarray, torch.cuda.Event | None]:
        if self._host_records is not None:
            return np.stack([record[:num_tokens] for record in self._host_records]), None
        on_device = torch.stack([record[:num_tokens] for record in self.records])
        on_host = torch.empty(on_device.shape, dtype=torch.uint8, pin_memory=True)
        on_host.copy_(on_device, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return on_host, arrived

    def count_pending(self, *, wait: bool = True) -> None:
        """Count the pending steps; with ``wait=False`` only those whose records have arrived on the host."""
        steps = []
        while self._pending and self._pending[0].is_ready(wait=wait):
            step = self._pending.popleft()
            expert_ids = np.asarray(step.expert_ids)
            steps.append(expert_ids)
            self.counts.step_paths[self._mlp.step_path(step.num_padded_tokens)] += 1
            if step.consume is not None:
                step.consume(expert_ids)
        if steps:
            self.counts.add(steps)
            self._num_pending_tokens -= sum(step.shape[1] for step in steps)
