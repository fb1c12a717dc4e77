"""One vLLM engine in a process of its own, measured step by step over standard input and output.

    python -m tomoe_vllm.diagnostics.bench.worker FOLDER

:mod:`tomoe_vllm.diagnostics.bench.engine` starts one for the dense model and one for ToMoE. Each line on standard input
is a JSON object and gets one JSON object on standard output:

``{"prompt_tokens": n, "batch": b, "new_tokens": m}``
    Start ``b`` sequences. ``first_s`` is the time until each of them has its first new token.
``{"step": 1}``
    Generate one more token for every sequence, in ``step_s`` seconds.
``{"trim": 1}``
    Return freed memory to the system.
``{}``
    Nothing but the memory figures, which every answer contains.

Any of them may have ``"norm"``: the RMSNorm kernel from now on, see :func:`make_norm_switchable`.
"""

import ctypes
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the worker calls each step itself, to time it
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


def memory() -> dict[str, int]:
    """Bytes of this process: resident now, resident and not backed by files, and the peak of resident memory."""
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
    """An engine on one checkpoint, in float32 and without prefix caching."""

    def __init__(self, folder: str) -> None:
        import torch
        from vllm import LLM

        self.select_norm = make_norm_switchable()
        self.llm = LLM(
            folder,
            dtype="float32",
            enforce_eager=True,
            skip_tokenizer_init=True,
            max_model_len=1536,
            max_num_seqs=64,
            max_num_batched_tokens=1024,
            enable_prefix_caching=False,
            disable_log_stats=True,
            async_scheduling=False,
        )
        self.engine = self.llm.llm_engine
        self.vocab_size = self.engine.model_config.get_vocab_size()
        self.generator = torch.Generator().manual_seed(0)
        self.num_requests = 0

    def start(self, prompt_tokens: int, batch: int, new_tokens: int) -> dict:
        """Start greedy generation from ``batch`` random prompts at once."""
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
        return {"first_s": time.perf_counter() - begin}

    def step(self) -> dict:
        """Generate one more token for every sequence."""
        begin = time.perf_counter()
        self.engine.step()
        return {"step_s": time.perf_counter() - begin}

    def run(self, task: dict) -> dict:
        """Carry out one line of standard input; returns the times it measured."""
        norm = task.pop("norm", None)
        if norm is not None:
            self.select_norm(norm)
        if "step" in task:
            return self.step()
        if "trim" in task:
            ctypes.CDLL(None).malloc_trim(0)  # engine.ALLOCATOR makes glibc keep what is freed
            return {}
        return self.start(**task) if task else {}


def main() -> None:
    """Answer until standard input ends."""
    os.environ.update(ENVIRONMENT)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # so that what vLLM prints is not read as an answer
    worker = Worker(sys.argv[1])
    print(json.dumps(memory()), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(worker.run(json.loads(line)) | memory()), file=answers, flush=True)
    os._exit(0)  # vLLM's threads can outlive the interpreter, which then aborts


if __name__ == "__main__":
    main()
