"""One vLLM engine that answers measurements: started by ``tomoe_vllm.diagnostics.bench.engine``, two side by side.

    python -m tomoe_vllm.diagnostics.bench.worker FOLDER

Each line on standard input is a JSON object, each answer one on standard output. ``{"prompt_tokens": n, "batch": b,
"new_tokens": m}`` starts sequences: ``first_s`` is the time from the first request until every sequence has a
token. ``{"step": 1}`` gives every sequence one more: ``step_s``. ``{"trim": 1}`` gives freed memory back to the system
first. All answers carry the memory; an empty object asks for no more.
"""

import ctypes
import json
import os
import sys
import time
from pathlib import Path

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # steps are called here, so that each can be timed
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


def memory() -> dict[str, int]:
    """Bytes of this process: resident now, of it not backed by files, and the most that was resident."""
    names = {"VmRSS": "resident_bytes", "RssAnon": "anonymous_bytes", "VmHWM": "peak_bytes"}
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {names[line[0][:-1]]: int(line[1]) * 1024 for line in lines if line[0][:-1] in names}


class Worker:
    """An engine on one checkpoint, float32, without prefix caching."""

    def __init__(self, folder: str) -> None:
        import torch
        from vllm import LLM

        self.engine = LLM(
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
        ).llm_engine
        self.vocab_size = self.engine.model_config.get_vocab_size()
        self.generator = torch.Generator().manual_seed(0)
        self.num_requests = 0

    def start(self, prompt_tokens: int, batch: int, new_tokens: int) -> dict:
        """Begin greedy generation of ``batch`` random prompts at once."""
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
        """One more token for every sequence."""
        begin = time.perf_counter()
        self.engine.step()
        return {"step_s": time.perf_counter() - begin}


def trim() -> dict:
    """Have glibc give back what is free, which ``engine.ALLOCATOR`` told it to keep."""
    ctypes.CDLL(None).malloc_trim(0)
    return {}


def main() -> None:
    """Answer until standard input ends."""
    os.environ.update(ENVIRONMENT)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints must not look like an answer
    worker = Worker(sys.argv[1])
    print(json.dumps(memory()), file=answers, flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        if "step" in task:
            result = worker.step()
        elif "trim" in task:
            result = trim()
        else:
            result = worker.start(**task) if task else {}
        print(json.dumps(result | memory()), file=answers, flush=True)
    os._exit(0)  # vLLM's threads now and then outlive the interpreter, which then aborts


if __name__ == "__main__":
    main()
