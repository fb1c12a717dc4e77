"""Which experts a worker's tokens took, counted step by step at next to no cost. Off unless asked for.

``--additional-config '{"tomoe_expert_statistics": true}'`` asks: then every gate copies its expert ids into a static
buffer, one small copy per layer that CUDA graphs and torch.compile keep (vLLM's compile cache knows the setting). After
a step the rows of its real tokens are read, all layers at once, and counted on the host with numpy. Padding lies behind
the real tokens; vLLM's warm-up and dummy runs do not pass the place where steps are counted (``worker_extension.py``).

On a GPU the rows travel to pinned memory behind an event and are counted when a later step or a question finds them
there: nothing waits in the forward pass. (The GPU side has never run: no GPU here.)
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

from tomoe_vllm.layers.expert_gate import STATISTICS_SETTING, ToMoEExpertGate

UNION_STEPS = 64
"""Over about so many recent steps the union of neurons is averaged: a step has one union, and one alone says little."""


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

    def add(self, expert_ids: np.ndarray, path: str) -> None:
        """Count one step. ``expert_ids``: [L, T] uint8, its real tokens."""
        num_layers, num_tokens = expert_ids.shape
        flat = (expert_ids + self._offsets).ravel()
        tokens = np.bincount(flat, minlength=self.tokens.size).reshape(self.tokens.shape)
        self.tokens += tokens
        self.num_steps += 1
        self.num_tokens += num_tokens
        self.step_paths[path] += 1
        experts = np.packbits(tokens != 0, axis=1, bitorder="little")
        bits, num_bytes = experts.tobytes(), experts.shape[1]
        unions = [self._union_size(i, bits[i * num_bytes : (i + 1) * num_bytes]) for i in range(num_layers)]
        self.union_neurons += (np.array(unions) - self.union_neurons) / min(self.num_steps, UNION_STEPS)


Consumer = Callable[[np.ndarray], None]


class ExpertRecorder:
    """Reads the gates' records of a model after each step and counts them.

    Raises ``ValueError`` (with what to do) for a model without gates or whose gates do not record.
    """

    def __init__(self, model: nn.Module) -> None:
        mlps = [mlp for mlp in model.modules() if isinstance(getattr(mlp, "expert_gate", None), ToMoEExpertGate)]
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
        self.is_on_host = self.records[0].device.type == "cpu"
        self._mlp: Any = mlps[0]
        signatures = np.stack([gate.signature.detach().cpu().numpy() for gate in gates])
        self.counts = ExpertCounts(signatures=signatures, num_experts=self.num_experts)
        self._host_records = [record.numpy() for record in self.records] if self.is_on_host else []
        self._pending: deque[tuple[torch.cuda.Event, Tensor, Consumer]] = deque()

    def read_step(self, num_tokens: int, num_padded_tokens: int, consume: Consumer | None = None) -> None:
        """Count the step that has just been launched, now or, on a GPU, as soon as its rows are on the host.

        ``num_padded_tokens``: rows that the layers saw. ``consume``: gets the step's [L, T] uint8 too.
        """
        path = self._mlp.step_path(num_padded_tokens)

        def count(expert_ids: np.ndarray) -> None:
            self.counts.add(expert_ids, path)
            if consume is not None:
                consume(expert_ids)

        if self.is_on_host:
            count(np.stack([record[:num_tokens] for record in self._host_records]))
            return
        on_device = torch.stack([record[:num_tokens] for record in self.records])
        on_host = torch.empty(on_device.shape, dtype=torch.uint8, pin_memory=True)
        on_host.copy_(on_device, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._pending.append((arrived, on_host, count))
        self.settle(waits=False)

    def settle(self, *, waits: bool = True) -> None:
        """Count what has arrived; ``waits``: all there is."""
        while self._pending and (waits or self._pending[0][0].query()):
            arrived, on_host, count = self._pending.popleft()
            arrived.synchronize()
            count(on_host.numpy())
