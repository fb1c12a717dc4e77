"""vLLM worker extension that reports expert usage.

With ``--worker-extension-cls tomoe_vllm.observability.worker_extension.ExpertExtension`` vLLM adds this class to the
bases of its worker, and ``collective_rpc`` can call its methods. They start and read an observer of the model runner's
steps (``compat/worker.py``). A worker counts nothing before :meth:`ExpertExtension.tomoe_start_experts`.

Results consist of plain lists, numbers and bytes, which vLLM can serialize.
"""

from typing import Any

from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

from tomoe_vllm.compat.worker import LaunchedStep, StepObserver
from tomoe_vllm.observability.expert_statistics import ExpertRecorder
from tomoe_vllm.observability.expert_traces import ExpertTraces


class ExpertObserver:
    """Counts the steps of one model runner of vLLM (either of its two implementations).

    Raises ``ValueError``, with the reason, for a model or a setting that cannot be counted.
    """

    def __init__(self, runner: Any, vllm_config: Any) -> None:
        if getattr(vllm_config.parallel_config, "use_ubatching", False):
            raise ValueError("expert statistics do not support micro-batched steps; leave --enable-dbo off")
        self.recorder = ExpertRecorder(runner.get_model())
        parallel = vllm_config.parallel_config
        is_split = getattr(parallel, "prefill_context_parallel_size", 1) > 1
        # Rejected draft tokens shift all later positions; with context parallelism a rank has only some of the rows.
        can_trace = vllm_config.speculative_config is None and not is_split
        self.traces = ExpertTraces(num_layers=len(self.recorder.records)) if can_trace else None
        self.steps = StepObserver(runner, self.count)
        self.steps.attach()

    def count(self, launched: LaunchedStep) -> None:
        """Record the experts of a launched step."""
        step = None
        if self.traces is not None:
            step = self.traces.begin_step(launched.scheduler_output, launched.request_ids)
        if launched.num_tokens:
            consume = None if step is None else step.store
            self.recorder.read_step(launched.num_tokens, launched.num_padded_tokens, consume)


class ExpertExtension:
    """Methods of a vLLM worker, for ``collective_rpc``."""

    def tomoe_start_experts(self) -> str | None:
        """Start counting. Idempotent. Returns None, or the reason why this worker cannot count."""
        if getattr(self, "_tomoe_observer", None) is None:
            try:
                self._tomoe_observer = ExpertObserver(self.model_runner, self.vllm_config)  # type: ignore[attr-defined]
            except ValueError as error:
                return str(error)
        return None

    def tomoe_expert_counts(self) -> dict[str, Any]:
        """The counts of this worker since the start (``ExpertCounts``), with its layers and tensor-parallel rank."""
        recorder = self._tomoe_observer.recorder
        recorder.count_pending()
        counts = recorder.counts
        return self._tomoe_shard() | {
            "num_neurons": counts.signatures.shape[1],
            "num_steps": counts.num_steps,
            "num_tokens": counts.num_tokens,
            "tokens": counts.tokens.tolist(),
            "union_neurons": counts.union_neurons.tolist(),
            "step_paths": dict(counts.step_paths),
        }

    def tomoe_expert_trace(self, trace_id: str, start: int) -> dict[str, Any] | None:
        """The experts of a traced request from position ``start`` on, [tokens, L] uint8 as bytes. None: unknown id."""
        observer = self._tomoe_observer
        observer.recorder.count_pending()
        trace = observer.traces.get(trace_id) if observer.traces is not None else None
        if trace is None:
            return None
        return self._tomoe_shard() | {
            "num_prompt_tokens": trace.num_prompt_tokens,
            "num_cached_tokens": trace.num_cached_tokens,
            "num_tokens": trace.num_tokens,
            "is_finished": trace.is_finished,
            "experts": trace.experts[start : trace.num_tokens].tobytes(),
        }

    def _tomoe_shard(self) -> dict[str, Any]:
        """Which part of the model this worker holds."""
        recorder = self._tomoe_observer.recorder
        return {
            "first_layer": recorder.first_layer,
            "num_layers": len(recorder.records),
            "num_experts": recorder.num_experts,
            "tensor_parallel_rank": get_tensor_model_parallel_rank(),
            "tensor_parallel_size": get_tensor_model_parallel_world_size(),
        }
