"""vLLM engines for the parity tests, and the reference model they are compared with.

One engine at a time runs in the test process: loading errors are then exceptions that a test can inspect, and the
second engine starts in seconds. Threads are not bound to cores: vLLM would pin this process for all later tests.
"""

import gc
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

NUM_TOKENS = 24
PROMPT_LENGTHS = (1, 2, 5, 8, 13, 16, 17, 31, 32, 33, 40, 48, 55, 64, 65, 90)
"""A single token, lengths around the attention kernel's block of 32, and 16 prompts in total."""


ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "OMP_NUM_THREADS": "1",
}
"""Environment variables for vLLM while an engine runs."""


def make_prompts(vocab_size: int, lengths=PROMPT_LENGTHS, seed: int = 7) -> list[list[int]]:
    """Random token ids from a fixed seed."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, vocab_size, (length,), generator=generator).tolist() for length in lengths]


@dataclass(frozen=True)
class Completion:
    """A prompt, its greedy continuation, and logprobs of every token but the first, or of the last ones only."""

    prompt: list[int]
    tokens: list[int]
    logprobs: torch.Tensor  # float32, at most [prompt + tokens - 1]


class Engine:
    """A vLLM engine on one checkpoint, without tokenizer."""

    def __init__(self, folder: Path, **options):
        from vllm import LLM

        defaults = {
            "dtype": "float32",
            "enforce_eager": True,
            "skip_tokenizer_init": True,
            "max_model_len": 256,
            "max_num_seqs": 16,
            "num_gpu_blocks_override": 64,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            "enable_prefix_caching": False,  # cached prompts would have no logprobs
        }
        self.llm = LLM(str(folder), **(defaults | options))

    def inspect(self, function):
        """Result of ``function(model)`` on the engine's own model."""
        return self.llm.apply_model(function)[0]

    def complete(
        self,
        prompts: list[list[int]],
        *,
        num_tokens: int = NUM_TOKENS,
        prompt_logprobs: int | None = 0,
        **options,
    ) -> list[Completion]:
        """Greedy continuation of all prompts in one batch. ``prompt_logprobs=None``: no logprobs of the prompts."""
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0,
            max_tokens=num_tokens,
            ignore_eos=True,
            prompt_logprobs=prompt_logprobs,
            logprobs=0,
            detokenize=False,
        )
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self.llm.generate(inputs, sampling, use_tqdm=False, **options)
        completions = []
        for prompt, output in zip(prompts, outputs, strict=True):
            tokens = list(output.outputs[0].token_ids)
            rows = [*(output.prompt_logprobs or [None])[1:], *output.outputs[0].logprobs]
            ids = (prompt + tokens)[-len(rows) :]
            logprobs = torch.tensor([row[token].logprob for row, token in zip(rows, ids, strict=True)])
            completions.append(Completion(prompt, tokens, logprobs))
        return completions


def keep_collections_short(patch: pytest.MonkeyPatch) -> None:
    """Exclude existing objects, mostly imported modules, from garbage collection while an engine runs.

    vLLM runs nine full collections during the life of an engine and unfreezes everything at the end. Objects created by
    the engine itself remain collectable.
    """
    gc.collect()
    gc.freeze()
    for name in ("freeze", "unfreeze"):
        patch.setattr(gc, name, lambda: None)


@contextmanager
def start_engine(folder: Path, **options):
    """Context manager of an :class:`Engine` that is always shut down."""
    engine = None
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        keep_collections_short(patch)
        try:
            engine = Engine(folder, **options)
            yield engine
        finally:
            if engine is not None:
                engine.llm.llm_engine.engine_core.shutdown()
            del engine
            gc.collect()


@torch.no_grad()
def reference_completion(model, completion: Completion) -> Completion:
    """Greedy tokens and logprobs of the reference model for the same text, from one forward pass over it.

    Its argmax at every step equals the engine's token if and only if its own greedy generation gives these tokens.
    """
    ids = completion.prompt + completion.tokens
    logprobs = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    tokens = logprobs[len(completion.prompt) - 1 : -1].argmax(-1).tolist()
    return Completion(completion.prompt, tokens, logprobs[range(len(ids) - 1), ids[1:]])


def max_logprob_difference(model, completions: list[Completion]) -> float:
    """Largest logprob difference between engine and reference over all tokens of all completions."""
    return float(torch.cat([logprob_differences(model, completion) for completion in completions]).max())


def logprob_differences(model, completion: Completion) -> torch.Tensor:
    """Absolute differences between engine and reference for each logprob of ``completion``."""
    expected = reference_completion(model, completion).logprobs[-len(completion.logprobs) :]
    return (completion.logprobs - expected).abs()


@pytest.fixture(scope="session")
def prompts():
    from tests.helpers.tiny_models import VOCAB_SIZE

    return make_prompts(VOCAB_SIZE)
