"""Model card: the README.md of a checkpoint."""

import json
from pathlib import Path

from tomoe_training.artifacts.atomic import write_text
from tomoe_vllm.hf.tomoe_math import BlockShape


def _span(widths: list[int]) -> str:
    return f"{min(widths)} to {max(widths)} (mean {sum(widths) / len(widths):.0f})"


UNCHANGED = "the dense weights are\nunchanged; routers choose, per token, which of them are used."
"""Part of every exported card; :func:`fine_tuned_card` replaces it."""


def model_card(config, widths, shape: BlockShape) -> str:
    """Model card text for an adapter config, the exported widths and the block shape."""
    training = config.training
    sources = ", ".join(map(str, training.get("data", []))) or "not recorded"
    return f"""---
library_name: transformers
tags: [tomoe, moe, vllm]
---

# {config.base_model_name}, {widths.active_ratio(shape):.0%} active (ToMoE)

Converted from **{config.base_model_name}** by [ToMoE](https://arxiv.org/abs/2501.15316): {UNCHANGED}

| | |
|---|---|
| active block parameters | {widths.active_parameters(shape):,} of {shape.total_parameters * config.num_layers:,} \
({widths.active_ratio(shape):.2%}; budget {config.active_ratio:.0%} in training) |
| experts per MLP | {config.num_experts}, top-1, equally wide in a layer |
| neurons per expert | {_span(widths.experts)} of {shape.intermediate_size} |
| Q/K dims per head | {_span(widths.qk_dims)} of {shape.head_dim} |
| V/O dims per token | {_span(widths.vo_dims)} of {shape.head_dim}, `{config.vo_mode}` |
| trained on | {sources} |
| steps, tokens | {training.get("steps", "?")}, {training.get("tokens", "?")} |
| training time | {training.get("seconds", 0) / 3600:.2f} h |
| command | `{" ".join(training.get("provenance", {}).get("command", ["not recorded"]))}` |
| base model hash | `{config.base_model_hash}` |

## Use

```
pip install "./tomoe-vllm[gpu]"     # a checkout of ToMoE on vLLM, or its wheel
vllm serve ./this-folder --trust-remote-code
```

or, with transformers alone: `AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)` (the
reference model: exact, not fast). `tomoe_provenance.json` holds the resolved run config and versions.
"""


PERPLEXITY = """
## Perplexity

| text | blocks x tokens | dtype, backend | perplexity |
|---|---|---|---|
"""


def record_perplexity(folder: Path, facts: dict) -> None:
    """Add a result of ``tomoe eval ppl`` to a checkpoint's card; it replaces an earlier result of the same measurement.

    Raises ``ValueError`` for a folder that is not a ToMoE checkpoint: cards of other models are not changed.
    """
    card, config = folder / "README.md", json.loads((folder / "config.json").read_text())
    if not str(config.get("model_type", "")).startswith("tomoe_") or not card.is_file():
        raise ValueError(f"{folder} is not a ToMoE checkpoint with a README.md; leave --record out")
    text = card.read_text()
    if PERPLEXITY not in text:
        text = text.rstrip() + "\n" + PERPLEXITY
    before, after = text.split(PERPLEXITY)
    key = f"| {facts['text']} | {facts['blocks']} x {facts['block_size']} | {facts['dtype']}, {facts['backend']} |"
    rows, separator, rest = after.partition("\n\n")
    kept = [row for row in rows.splitlines() if not row.startswith(key)]
    table = "\n".join([*kept, f"{key} {facts['ppl']:.2f} |"])
    write_text(card, before + PERPLEXITY + table + (separator + rest if rest else "\n"))


def fine_tuned_card(card: str, finetuning: dict) -> str:
    """A checkpoint's card after ``tomoe finetune``: the weights are no longer those of the base."""
    changed = (
        "routers choose, per\ntoken, which of its weights are used. **The weights were then fine-tuned** under these "
        "masks (see the end): they are no\nlonger the base's."
    )
    sources = ", ".join(map(str, finetuning["data"]))
    before, heading, after = card.partition(PERPLEXITY)
    if heading:  # measured on the weights before
        card = before.rstrip() + "\n\n" + after.partition("\n\n")[2]
    return f"""{card.replace(UNCHANGED, changed).rstrip()}

## Fine-tuned

The dense weights were changed after conversion (`tomoe finetune`, {finetuning["method"]}): {finetuning["steps"]} \
steps, {finetuning["tokens"]:,} tokens
of {sources}; loss {finetuning["first_loss"]:.4f} to {finetuning["final_loss"]:.4f}. Masks and routers are those of \
the conversion, byte for byte.

| | |
|---|---|
| fingerprint of these dense weights | `{finetuning["dense_hash"]}` |
| and before | `{finetuning["source_dense_hash"]}` |
"""
