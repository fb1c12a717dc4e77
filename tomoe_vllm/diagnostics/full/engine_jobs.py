"""Jobs of the part "engine": one vLLM engine each, in a process of its own.

On a GPU engines run as users serve them: bfloat16, compiled, with CUDA graphs. On a CPU they run in float32 and eager
mode on a tiny model, so that these checks run too.
"""

import gc
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tomoe_vllm.diagnostics.bench.worker import Worker
from tomoe_vllm.diagnostics.full.engine_models import make_models
from tomoe_vllm.diagnostics.full.engine_parity import (
    SMALLEST_LIMIT,
    Answer,
    Text,
    compare,
    expert_counts,
    generate,
    load_reference,
    make_prompts,
)
from tomoe_vllm.diagnostics.full.plan import Job, Options
from tomoe_vllm.diagnostics.full.report import DONE, FAILED, NOT_RUN, PASSED, NotRunError, Result

NEW_TOKENS = 16
STATISTICS = {
    "worker_extension_cls": "tomoe_vllm.observability.worker_extension.ExpertExtension",
    "additional_config": {"tomoe_expert_statistics": True},
}
ROUTE_LIMIT = 0.02
"""Share of tokens that the engine may route differently from float32 routing, per layer and expert."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setup:
    """How engines run on this machine. ``rounds``: of each measurement; ``decode_tokens``: per sequence."""

    device: str
    dtype: str
    arguments: dict[str, Any]
    batches: tuple[int, ...]
    prompts: tuple[int, ...]
    decode_tokens: int
    rounds: int

    @classmethod
    def here(cls) -> "Setup":
        """The setup of a GPU, or of a CPU."""
        common = {
            "skip_tokenizer_init": True,
            "max_num_seqs": 64,
            "enable_prefix_caching": False,
            "disable_log_stats": True,
        }
        if torch.cuda.is_available():
            sizes = {"max_model_len": 2048 + 32, "max_num_batched_tokens": 4096, "gpu_memory_utilization": 0.45}
            graphs = {"compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64]}}
            return cls(
                device="cuda",
                dtype="bfloat16",
                arguments=common | sizes | graphs | {"dtype": "bfloat16"},
                batches=(1, 4, 16, 64),
                prompts=(256, 2048),
                decode_tokens=64,
                rounds=3,
            )
        sizes = {"max_model_len": 512, "max_num_batched_tokens": 1024, "enforce_eager": True}
        return cls(
            device="cpu",
            dtype="float32",
            arguments=common | sizes | {"dtype": "float32"},
            batches=(1, 4),
            prompts=(256,),
            decode_tokens=4,
            rounds=1,
        )


def run(job: Job, options: Options) -> Iterator[Result]:
    """The results of one job."""
    if job.kind == "models":
        yield Result(part=job.part, name=job.name, status=DONE, values=make_models(options))
        return
    layout, scratch = job.arguments["layout"], Path(options.scratch)
    folder = scratch / ("dense" if layout == "dense" else "tomoe")
    if not (folder / "config.json").exists():
        raise NotRunError("there is no model to load")
    yield from EngineRun(job, layout, folder, Setup.here()).results()


class EngineRun:
    """One engine and its checks. Each yields a result, or its error."""

    def __init__(self, job: Job, layout: str, folder: Path, setup: Setup) -> None:
        self.job, self.layout, self.folder, self.setup = job, layout, folder, setup
        self.is_broken = False

    def _check(self, name: str, check: Callable[[], Answer]) -> Result:
        """``check`` returns why it failed, or None, and values. After an error the engine is not used again."""
        if self.is_broken:
            name = f"{self.job.name}: {name}"
            return Result(part="engine", name=name, status=NOT_RUN, reason="an earlier check broke the engine")
        try:
            reason, values = check()
        except Exception as error:
            traceback.print_exc()
            self.is_broken = True
            reason, values = _one_line(error), {}
        return self._result(name, reason, values)

    def _result(self, name: str, reason: str | None, values: dict[str, Any]) -> Result:
        return Result(
            part="engine",
            name=f"{self.job.name}: {name}",
            status=FAILED if reason else PASSED,
            reason=reason,
            values=values | {"layout": self.layout},
        )

    def results(self) -> Iterator[Result]:
        """Start the engine, then check it; the most valuable checks first."""
        yield self._check("starts", self.start)
        self.texts: dict[str, list[Text]] = {}
        if self.layout == "observer":
            yield self._check("counts experts", self.count_experts)
            return
        yield self._check("generates", self.generate)
        yield self._check("decode", self.decode)
        yield self._check("prefill", self.prefill)
        if self.layout != "dense":
            yield self._check("reload_weights", self.reload)
        if self.setup.device == "cuda":
            yield self._check("kernels of a step", self.profile)
        yield from self.parity()

    def start(self) -> Answer:
        """Load and compile."""
        arguments = dict(self.setup.arguments)
        if self.layout != "dense":
            arguments["hf_overrides"] = {"expert_layout": "masked" if self.layout == "observer" else self.layout}
        if self.layout == "observer":
            arguments |= STATISTICS
        begin = time.perf_counter()
        self.worker = Worker(str(self.folder), self.setup.device, arguments)
        self.llm = self.worker.llm
        self.vocab_size = self.llm.llm_engine.model_config.get_vocab_size()
        self.prompts = make_prompts(self.vocab_size, arguments["max_model_len"])
        config = self.llm.llm_engine.vllm_config
        return None, {
            "start_s": time.perf_counter() - begin,
            "compilation_mode": str(config.compilation_config.mode),
            "cuda_graphs": str(config.compilation_config.cudagraph_mode),
            "runner": self.llm.collective_rpc(_runner_module)[0],
        }

    def generate(self) -> Answer:
        """Logprobs of a decode after a prefill, and of prompts."""
        self.texts["decode"] = generate(self.llm, self.prompts, NEW_TOKENS)
        self.texts["prefill"] = generate(self.llm, self.prompts, 1, prompt_logprobs=0)
        numbers = torch.cat([text.logprobs for group in self.texts.values() for text in group])
        return None if bool(numbers.isfinite().all()) else "a logprob is not finite", {"tokens": len(numbers)}

    def decode(self) -> Answer:
        """Time of a decode step, by batch size."""
        rows = []
        for batch in self.setup.batches:
            steps = self.setup.decode_tokens
            times = [
                self.worker.start(16, batch, steps + 1, is_finished=True)["rest_s"] / steps
                for _ in range(self.setup.rounds + 1)
            ]
            rows.append({"batch": batch, "step_ms": 1e3 * statistics.median(times[1:]), **self.worker.path(batch)})
        return None, {"rows": rows}

    def prefill(self) -> Answer:
        """Time to the first token of one prompt, by its length."""
        rows = []
        for length in self.setup.prompts:
            times = [self.worker.start(length, 1, 1)["first_s"] for _ in range(self.setup.rounds + 1)]
            rows.append({"prompt_tokens": length, "ms": 1e3 * statistics.median(times[1:]), **self.worker.path(length)})
        return None, {"rows": rows}

    def profile(self) -> Answer:
        """Kernels of one decode step and their time, without the host: 8 more steps are 8 times this."""
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        def kernels(steps: int, batch: int) -> tuple[int, float]:
            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                self.worker.start(16, batch, steps, is_finished=True)
                torch.cuda.synchronize()
            events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
            times = [event.time_range.elapsed_us() for event in events if not event.is_user_annotation]
            return len(times), sum(times)

        rows = []
        for batch in self.setup.batches:
            (few, few_us), (many, many_us) = kernels(2, batch), kernels(10, batch)
            rows.append({"batch": batch, "kernels": (many - few) / 8, "gpu_ms": 1e-3 * (many_us - few_us) / 8})
        return None, {"rows": rows}

    def reload(self) -> Answer:
        """Load the weights again from the same files: logprobs must not change."""
        self.llm.collective_rpc("reload_weights")
        again = generate(self.llm, self.prompts, 1, prompt_logprobs=0)
        before, after = (torch.cat([text.logprobs for text in texts]) for texts in (self.texts["prefill"], again))
        difference = float((before - after).abs().max())
        reason = None if difference <= SMALLEST_LIMIT[self.setup.dtype] else f"logprobs change by {difference:.2g} nats"
        return reason, {"max_difference": difference}

    def count_experts(self) -> Answer:
        """Statistics of two batches against the routing of the Hugging Face model in float32."""
        refused = [reason for reason in self.llm.collective_rpc("tomoe_start_experts") if reason]
        if refused:
            return refused[0], {}
        texts = [text for _ in range(2) for text in generate(self.llm, self.prompts, NEW_TOKENS)]
        answer = self.llm.collective_rpc("tomoe_expert_counts")[0]
        counted, num_tokens = torch.tensor(answer["tokens"]), sum(len(text.tokens) - 1 for text in texts)
        self.shut_down()
        expected = expert_counts(load_reference(self.folder, "float32", self.setup.device), texts)
        wrong = float((counted - expected).abs().max() / num_tokens)
        values = {"tokens": num_tokens, "steps": answer["num_steps"], "largest_difference": wrong}
        if answer["num_tokens"] != num_tokens or not bool((counted.sum(dim=1) == num_tokens).all()):
            return f"{answer['num_tokens']} tokens were counted, {num_tokens} were computed", values
        return None if wrong <= ROUTE_LIMIT else f"{wrong:.1%} of the tokens are counted for other experts", values

    def parity(self) -> Iterator[Result]:
        """The texts that the engine has generated, against the Hugging Face model."""
        self.shut_down()
        if not self.texts:  # the engine did not start or generate: that is a failed result already
            return
        answers: dict[str, Answer]
        try:
            answers = compare(self.texts, self.folder, self.setup.dtype, self.setup.device)
        except Exception as error:
            answers = dict.fromkeys(self.texts, (_one_line(error), {}))
        for name, (reason, values) in answers.items():
            yield self._result(f"{name} agrees with HF", reason, values)

    def shut_down(self) -> None:
        """Free the engine's memory for the Hugging Face model."""
        if hasattr(self, "llm"):
            self.llm.llm_engine.engine_core.shutdown()
            del self.llm, self.worker
        gc.collect()
        if self.setup.device == "cuda":
            torch.cuda.empty_cache()


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


def _runner_module(worker: Any) -> str:
    return type(worker.model_runner).__module__
