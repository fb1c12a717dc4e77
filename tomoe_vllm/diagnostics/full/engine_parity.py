"""vLLM against the Hugging Face model of the same checkpoint: logprobs of the same tokens, and routes.

The Hugging Face model runs in float32 and in the engine's dtype. The error of the latter says how much of a difference
is rounding.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tomoe_vllm.hf.configuration_tomoe import family_of
from tomoe_vllm.hf.register import register_with_transformers

PROMPT_LENGTHS = (1, 5, 16, 33, 100, 300)
ROUNDING = 3.0
"""An engine may differ from float32 by this many times as much as the Hugging Face model in the same dtype does: its
kernels round at other places. A wrong layer differs by about 1 nat."""
SMALLEST_LIMIT = {"float32": 1e-3, "bfloat16": 2e-2}
"""In nats, where the Hugging Face model differs by less."""


@dataclass(frozen=True, slots=True)
class Text:
    """Tokens, and the engine's logprobs of the last ones."""

    tokens: list[int]
    logprobs: Tensor


def make_prompts(vocab_size: int, max_length: int) -> list[list[int]]:
    """Random prompts of :data:`PROMPT_LENGTHS`."""
    generator = torch.Generator().manual_seed(7)
    lengths = [length for length in PROMPT_LENGTHS if 2 * length < max_length]
    return [torch.randint(2, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def generate(llm: Any, prompts: list[list[int]], new_tokens: int, prompt_logprobs: int | None = None) -> list[Text]:
    """Greedy continuations of all prompts in one batch, with the logprobs of what was asked for."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0,
        max_tokens=new_tokens,
        ignore_eos=True,
        logprobs=0,
        prompt_logprobs=prompt_logprobs,
        detokenize=False,
    )
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    texts = []
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = [*prompt, *output.outputs[0].token_ids]
        rows = [*(output.prompt_logprobs or [None])[1:], *output.outputs[0].logprobs]
        pairs = zip(rows, tokens[len(tokens) - len(rows) :], strict=True)
        texts.append(Text(tokens, torch.tensor([row[token].logprob for row, token in pairs])))
    return texts


def load_reference(folder: Path, dtype: str, device: str) -> Any:
    """The Hugging Face model of a dense or ToMoE checkpoint."""
    from transformers import AutoModelForCausalLM

    register_with_transformers()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval().to(device)


@torch.inference_mode()
def reference_logprobs(model: Any, text: Text) -> tuple[Tensor, int]:
    """Logprobs of the same tokens as ``text.logprobs``, and how many of these tokens are the model's own choice."""
    ids = torch.tensor([text.tokens], device=model.device)
    logprobs = model(ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)[-len(text.logprobs) :]
    targets = ids[0, -len(text.logprobs) :]
    return logprobs.gather(1, targets[:, None])[:, 0].cpu(), int((logprobs.argmax(-1) == targets).sum())


Answer = tuple[str | None, dict[str, Any]]
"""Why a check failed, or None; and what it measured."""


def compare(texts: dict[str, list[Text]], folder: Path, engine_dtype: str, device: str) -> dict[str, Answer]:
    """The engine's texts by name, against the Hugging Face model in ``folder``."""
    found: dict[str, dict[str, Tensor]] = {name: {} for name in texts}
    same: dict[str, int] = {}
    for dtype in dict.fromkeys((engine_dtype, "float32")):
        model = load_reference(folder, dtype, device)
        for name, group in texts.items():
            rows = [reference_logprobs(model, text) for text in group]
            found[name][dtype] = torch.cat([row for row, _ in rows])
            same[name] = sum(count for _, count in rows)  # in the end that of float32
        del model
        gc.collect()
    answers = {}
    for name, group in texts.items():
        engine = torch.cat([text.logprobs for text in group])
        reason, values = judge(engine, found[name][engine_dtype], found[name]["float32"], engine_dtype)
        if name == "decode":  # all its tokens were chosen by the engine
            values["same_choice_as_float32"] = f"{same[name]} of {len(engine)}"
        answers[name] = reason, values
    return answers


def judge(engine: Tensor, rounded: Tensor, exact: Tensor, dtype: str) -> Answer:
    """Whether the engine's logprobs differ from exact ones by no more than rounding explains, by median and mean."""
    differences: dict[str, float] = {}
    reason = None
    for name, average in (("median", torch.median), ("mean", torch.mean)):
        of_engine, of_rounding = (float(average((values - exact).abs())) for values in (engine, rounded))
        limit = max(SMALLEST_LIMIT[dtype], ROUNDING * of_rounding)
        differences |= {f"{name}_difference": of_engine, f"{name}_of_hf_{dtype}": of_rounding, f"{name}_limit": limit}
        if not of_engine <= limit:
            reason = f"{name} difference of logprobs from HF in float32 is {of_engine:.2g} nats (limit {limit:.2g})"
    return reason, {"tokens": len(engine)} | differences


@torch.inference_mode()
def expert_counts(model: Any, texts: list[Text]) -> Tensor:
    """Tokens of each layer's experts, [L, N] int64, by the Hugging Face model. The last token of a text is left out.

    The routers are applied in float64 to the inputs of the MLPs.
    """
    layers = model.model.layers
    counts = torch.zeros(len(layers), model.config.num_experts, dtype=torch.int64)

    def count(index: int) -> Callable[..., None]:
        def hook(module: Any, inputs: tuple[Tensor, ...]) -> None:
            logits = inputs[0].flatten(0, -2).double() @ layers[index].mlp.expert_gate.router.weight.double().T
            counts[index] += logits.argmax(dim=-1).cpu().bincount(minlength=counts.shape[1])

        return hook

    mlp_in = family_of(model.config).mlp_in
    hooks = [layer.get_submodule(mlp_in).register_forward_pre_hook(count(i)) for i, layer in enumerate(layers)]
    for text in texts:
        model(torch.tensor([text.tokens[:-1]], device=model.device), use_cache=False)
    for hook in hooks:
        hook.remove()
    return counts
