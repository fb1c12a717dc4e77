"""The engine and vLLM's app: the only module of this package that uses vLLM.

vLLM's app is built as ``vllm serve`` builds it, so its OpenAI routes are unchanged. The engine client is
:class:`AdmittingLLM`, in which every sequence takes a slot before the engine sees it.
"""

import contextlib
import hashlib
import os
import sys
import time
from argparse import Namespace
from collections.abc import AsyncGenerator, AsyncIterator
from http import HTTPStatus
from itertools import count
from typing import Any

import torch
from fastapi import FastAPI
from vllm import SamplingParams
from vllm import __version__ as vllm_version
from vllm.platforms import current_platform

from tomoe_serving.admission.calibration import Stream
from tomoe_serving.admission.controller import AdmissionClosedError, AdmissionController
from tomoe_serving.admission.step_time import Limits
from tomoe_serving.api.compute_budget import BudgetSource, Capacity, InUse, cost_of
from tomoe_serving.server.memory import free_memory
from tomoe_serving.server.settings import ServerSettings
from tomoe_vllm.compat.server import (
    AsyncEngineArgs,
    AsyncLLM,
    FlexibleArgumentParser,
    GracefulHTTPError,
    RequestOutput,
    RequestOutputKind,
    StatLoggerBase,
    UsageContext,
    VLLMValidationError,
    build_app,
    cli_env_setup,
    configure_logging_from_args,
    init_app_state,
    log_format_flags,
    make_arg_parser,
    validate_parsed_serve_args,
)


class AdmittingLLM(AsyncLLM):
    """vLLM's client of its engine process, in which sequences wait for a slot of ``admission``.

    Attributes:
        admission: replaced by the server once the engine's limits are known; before that nothing waits.
        kv_usage: stat logger; its ``share`` is the share of the KV blocks in use, 0 to 1.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.admission = AdmissionController(max_sequences=sys.maxsize, queue_size=0)
        self.kv_usage = KvUsage()
        self.running_ids: set[str] = set()
        super().__init__(*args, **kwargs | {"stat_loggers": [lambda *_: self.kv_usage]})

    def check_admission(self, n: int = 1, request_id: str | None = None) -> None:
        """Refuse more sequences than could ever run together; vLLM calls it before a response is started."""
        most = self.admission.max_sequences
        if n > most:
            raise VLLMValidationError(f"n is {n}, but this server runs at most {most} sequences", parameter="n")
        super().check_admission(n, request_id)

    async def generate(
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, **kwargs: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """As vLLM's, while holding a slot. The slot is given back however the caller stops reading."""
        held = self.admission.slot(
            sequences=sampling_params.n,
            prompt_tokens=_prompt_tokens(prompt),
            max_tokens=sampling_params.max_tokens or 1,
        )
        is_delta = sampling_params.output_kind == RequestOutputKind.DELTA
        try:
            async with held as slot:
                self.running_ids.add(request_id)
                outputs = super().generate(prompt, sampling_params, request_id, **kwargs)
                async with contextlib.aclosing(outputs):
                    async for output in outputs:
                        tokens = sum(len(each.token_ids) for each in output.outputs)
                        self.admission.produced(slot, tokens if is_delta else tokens - slot.tokens, time.monotonic())
                        yield output
        except AdmissionClosedError as error:
            raise GracefulHTTPError(str(error), HTTPStatus.SERVICE_UNAVAILABLE) from error
        finally:
            self.running_ids.discard(request_id)

    async def abort_all(self) -> None:
        """End every running request; each stream gets a last chunk whose ``finish_reason`` is "abort"."""
        await self.abort(list(self.running_ids))


class KvUsage(StatLoggerBase):
    """Stat logger of vLLM that keeps the share of KV blocks in use that the engine reported last."""

    def __init__(self, vllm_config: Any = None, engine_index: int = 0) -> None:
        self.share = 0.0

    def record(self, scheduler_stats: Any, iteration_stats: Any, mm_cache_stats: Any = None, engine_idx: int = 0):
        """Called by vLLM after each step."""
        if scheduler_stats is not None:
            self.share = scheduler_stats.kv_cache_usage

    def log_engine_initialized(self) -> None:
        """Part of the interface."""


class _Parser(FlexibleArgumentParser):
    def error(self, message: str) -> Any:
        raise ValueError(f"flags for vLLM: {message}")


def parse_engine_args(settings: ServerSettings, defaults: dict[str, object], limits: Limits | None) -> Namespace:
    """vLLM's arguments: ``defaults``, overridden by the limits of an SLO, overridden by the operator's flags.

    Raises ``ValueError`` for flags that vLLM does not know.
    """
    cli_env_setup()
    name = settings.checkpoint.resolve().name
    flags = ["--model", str(settings.checkpoint), "--served-model-name", name, str(settings.checkpoint)]
    flags += ["--shutdown-timeout", str(round(settings.drain_timeout))]
    flags += log_format_flags(settings.log_format)
    if current_platform.is_cpu():
        os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        flags += ["--dtype", "float32", "--enforce-eager"]
    for key, value in defaults.items():
        flags += [f"--{key.replace('_', '-')}"] + ([] if value is True else [str(value)])
    if limits is not None:
        flags += ["--max-num-seqs", str(limits.max_sequences), "--max-num-batched-tokens", str(limits.max_step_tokens)]
    if settings.log_prompts:
        flags.append("--enable-log-requests")
    args = make_arg_parser(_Parser()).parse_args([*flags, *settings.engine_args])
    args.allowed_origins = list(settings.allowed_origins)
    args.allowed_methods = ["GET", "POST", "OPTIONS"]
    configure_logging_from_args(args)
    validate_parsed_serve_args(args)
    return args


@contextlib.asynccontextmanager
async def start_engine(args: Namespace) -> AsyncIterator[AdmittingLLM]:
    """Run the engine in its own process until the block ends. Raises what vLLM raises if it cannot start."""
    config = AsyncEngineArgs.from_cli_args(args).create_engine_config(UsageContext.OPENAI_API_SERVER)
    client = AdmittingLLM.from_vllm_config(
        config,
        usage_context=UsageContext.OPENAI_API_SERVER,
        enable_log_requests=args.enable_log_requests,
        disable_log_stats=args.disable_log_stats,
    )
    try:
        await client.reset_mm_cache()
        yield client
    finally:
        client.shutdown(timeout=config.shutdown_timeout)


async def build_openai_app(client: AdmittingLLM, args: Namespace) -> FastAPI:
    """vLLM's FastAPI app, as ``vllm serve`` builds it."""
    tasks = await client.get_supported_tasks()
    app = build_app(args, tasks, client.model_config)
    await init_app_state(client, app.state, args, tasks)
    return app


def token_stream(client: AdmittingLLM) -> Stream:
    """Greedy generation of one prompt for the measurement of step times."""
    numbers = count()

    async def stream(prompt: list[int], new_tokens: int) -> AsyncIterator[int]:
        params = SamplingParams(
            temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False, output_kind=RequestOutputKind.DELTA
        )
        name = f"calibration-{next(numbers)}"
        async for output in client.generate({"prompt_token_ids": prompt}, params, name):
            yield len(output.outputs[0].token_ids)

    return stream


def kv_capacity(client: AsyncLLM) -> int:
    """Tokens that the KV cache holds."""
    cache = client.vllm_config.cache_config
    return (cache.num_gpu_blocks or 0) * cache.block_size


def kv_value_bytes(client: AsyncLLM) -> int:
    """Bytes of one value in the KV cache."""
    name = client.vllm_config.cache_config.cache_dtype
    return client.model_config.dtype.itemsize if name == "auto" else 1 if name.startswith("fp8") else 2


def parameter_bytes(client: AsyncLLM, facts: dict[str, Any]) -> float:
    """Bytes of one parameter as it is stored in memory; the mean where the checkpoint is quantized."""
    if client.vllm_config.quant_config is not None:
        return facts["total_bytes"] / facts["total_parameters"]
    return float(client.model_config.dtype.itemsize)


def step_limits(client: AsyncLLM) -> Limits:
    """Limits of vLLM's scheduler."""
    scheduler = client.vllm_config.scheduler_config
    return Limits(scheduler.max_num_seqs, scheduler.max_num_batched_tokens)


def profile_key(settings: ServerSettings, facts: dict[str, Any]) -> dict[str, object]:
    """What measured step times depend on."""
    config = (settings.checkpoint / "config.json").read_bytes()
    return {
        "checkpoint": hashlib.sha256(config).hexdigest()[:16] + f"-{facts['total_bytes']}",
        "vllm": vllm_version,
        "device": current_platform.get_device_name(),
        "threads": torch.get_num_threads(),
        "engine_args": list(settings.engine_args),
    }


def memory_needed(args: Namespace, facts: dict[str, Any]) -> int:
    """Bytes of weights that each device must hold."""
    dtype = getattr(torch, args.dtype, None) if args.dtype != "auto" else None
    total = facts["total_parameters"] * dtype.itemsize if dtype and not args.quantization else facts["total_bytes"]
    return total // (args.tensor_parallel_size * args.pipeline_parallel_size)


def memory_available() -> int:
    """Bytes that this process can still allocate on the device."""
    return free_memory() if current_platform.is_cpu() else torch.cuda.mem_get_info()[0]


def _prompt_tokens(prompt: Any) -> int:
    """Length of a prompt that vLLM has tokenized; 1 if it holds no token ids."""
    ids = prompt.get("prompt_token_ids") if isinstance(prompt, dict) else None
    return len(ids) if ids else 1


def bare_budget(client: AsyncLLM, args: Namespace, facts: dict[str, Any]) -> BudgetSource:
    """The budget under bare ``vllm serve``, where there is no admission and nothing was measured."""
    limits = step_limits(client)
    capacity = Capacity(
        max_sequences=limits.max_sequences,
        max_step_tokens=limits.max_step_tokens,
        queue_size=None,
        kv_tokens=kv_capacity(client),
        tpot_slo_ms=None,
        tokens_per_s=None,
    )
    cost = cost_of(facts, parameter_bytes(client, facts), kv_value_bytes(client))
    name = (args.served_model_name or [args.model])[0]
    return BudgetSource(name, cost, None, lambda: capacity, lambda: InUse(running=client.get_num_unfinished_requests()))
