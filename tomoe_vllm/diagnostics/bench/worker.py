"""One vLLM engine in a process of its own, measured step by step over standard input and output.

    python -m tomoe_vllm.diagnostics.bench.worker FOLDER DEVICE ARGUMENTS

:mod:`tomoe_vllm.diagnostics.bench.engine` starts one for the dense model and one for ToMoE. ARGUMENTS are those of
``vllm.LLM`` as JSON; ``setup.py`` has them for each DEVICE (cpu, cuda). Each line on standard input is a JSON object
and gets one JSON object on standard output:

``{"prompt_tokens": n, "batch": b, "new_tokens": m}``
    Start ``b`` sequences. ``first_s`` is the time until each of them has its first new token. With ``"is_finished"``
    true, also generate the rest of all sequences, in ``rest_s`` seconds.
``{"step": 1}``
    Generate one more token for every sequence, in ``step_s`` seconds. Only without asynchronous scheduling.
``{"path_of": n}``
    ``path``: the execution path of ToMoE's MLP in a step of ``n`` tokens; null for a dense model.
``{"trim": 1}``
    Return freed memory to the system.
``{}``
    Nothing but the memory figures, which every answer contains.

Any of them may have ``"norm"``: the RMSNorm kernel from now on, see :func:`make_norm_switchable`.
"""

import ctypes
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def memory(device: str) -> dict[str, int]:
    """Bytes in use: of this process on "cpu", of torch's allocator on "cuda" (weights, KV cache, CUDA graphs).

    cpu: resident now, resident and not backed by files, peak of resident memory. cuda: allocated now, reserved, and the
    peak of what was allocated.
    """
    if device == "cuda":
        import torch

        return {
            "allocated_bytes": torch.cuda.memory_allocated(),
            "reserved_bytes": torch.cuda.memory_reserved(),
            "peak_bytes": torch.cuda.max_memory_allocated(),
        }
    names = {"VmRSS": "resident_bytes", "RssAnon": "anonymous_bytes", "VmHWM": "peak_bytes"}
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {names[line[0][:-1]]: int(line[1]) * 1024 for line in lines if line[0][:-1] in names}


def make_norm_switchable() -> Callable[[str], None]:
    """Make the kernel of vLLM's ``RMSNorm`` selectable in this process; returns the function that selects it by name.

    ``compiled`` (selected at first) is vLLM's compiled CPU kernel, called as in :class:`ToMoERMSNorm`; ``shipped`` is
    what vLLM itself runs on CPUs, plain torch. ToMoE's own norms always run the compiled kernel, so ``compiled`` is the
    fair baseline. Call this before the model is built: vLLM's layers look up ``forward_cpu`` when they are constructed.
    """
    from vllm.model_executor.layers.layernorm import RMSNorm

    from tomoe_vllm.layers.norm import ToMoERMSNorm

    kernels = {"compiled": ToMoERMSNorm.forward_cpu, "shipped": RMSNorm.forward_cpu}
    selected = kernels["compiled"]

    def forward_cpu(self, x, residual=None):
        return selected(self, x, residual)

    def select(name: str) -> None:
        nonlocal selected
        selected = kernels[name]

    RMSNorm.forward_cpu = forward_cpu
    return select


class Worker:
    """An engine on one checkpoint. On a CPU the norm of a dense model is switchable."""

    def __init__(self, folder: str, device: str, arguments: dict[str, Any]) -> None:
        import torch
        from vllm import LLM

        self.device = device
        self.select_norm = make_norm_switchable() if device == "cpu" else None
        self.llm = LLM(folder, **arguments)
        self.engine = self.llm.llm_engine
        self.vocab_size = self.engine.model_config.get_vocab_size()
        self.generator = torch.Generator().manual_seed(0)
        self.num_requests = 0

    def start(self, prompt_tokens: int, batch: int, new_tokens: int, is_finished: bool = False) -> dict:
        """Start greedy generation from ``batch`` random prompts at once; ``is_finished``: generate all tokens.

        The host's clock is right on GPUs too: a request has a token once the token is in host memory. With asynchronous
        scheduling the step after the first token runs already when it arrives, so ``rest_s`` is exactly the time of
        ``new_tokens - 1`` steps: from the end of the first to the end of the last.
        """
        import torch
        from vllm import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        prompts = torch.randint(2, self.vocab_size, (batch, prompt_tokens), generator=self.generator).tolist()
        begin = time.perf_counter()
        for prompt in prompts:
            self.num_requests += 1
            self.engine.add_request(str(self.num_requests), {"prompt_token_ids": prompt}, params)
        started: set[str] = set()
        while len(started) < batch:
            started |= {output.request_id for output in self.engine.step()}
        first = time.perf_counter()
        if not is_finished:
            return {"first_s": first - begin}
        while self.engine.has_unfinished_requests():
            self.engine.step()
        return {"first_s": first - begin, "rest_s": time.perf_counter() - first}

    def step(self) -> dict:
        """Generate one more token for every sequence."""
        begin = time.perf_counter()
        self.engine.step()
        return {"step_s": time.perf_counter() - begin}

    def path(self, num_tokens: int) -> dict:
        """Execution path of ToMoE's first MLP; None for a dense model."""

        def ask(model: "nn.Module") -> str | None:
            mlps = (module for module in model.modules() if hasattr(module, "step_path"))
            return next((mlp.step_path(num_tokens) for mlp in mlps), None)

        return {"path": self.llm.apply_model(ask)[0]}

    def run(self, task: dict) -> dict:
        """Carry out one line of standard input; returns the times it measured."""
        norm = task.pop("norm", None)
        if norm is not None and self.select_norm is not None:
            self.select_norm(norm)
        if "path_of" in task:
            return self.path(task["path_of"])
        if "step" in task:
            return self.step()
        if "trim" in task:
            ctypes.CDLL(None).malloc_trim(0)  # setup.CPU_ENVIRONMENT makes glibc keep what is freed
            return {}
        return self.start(**task) if task else {}


def main() -> None:
    """Answer until standard input ends."""
    folder, device, arguments = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # so that what vLLM prints is not read as an answer
    layout_logger = logging.getLogger("tomoe_vllm.layers.mlp.layout")  # says which layout ToMoE runs in, and why
    layout_logger.setLevel(logging.INFO)
    layout_logger.addHandler(logging.StreamHandler())
    worker = Worker(folder, device, json.loads(arguments))
    print(json.dumps(memory(device)), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(worker.run(json.loads(line)) | memory(device)), file=answers, flush=True)
    os._exit(0)  # vLLM's threads can outlive the interpreter, which then aborts


if __name__ == "__main__":
    main()
