"""The README.md of a checkpoint."""

from tomoe_vllm.hf.tomoe_math import BlockShape


def _span(widths: list[int]) -> str:
    return f"{min(widths)} to {max(widths)} (mean {sum(widths) / len(widths):.0f})"


def model_card(config, widths, shape: BlockShape) -> str:
    """Model card text for an adapter config, the exported widths and the block shape."""
    training = config.training
    sources = ", ".join(map(str, training.get("data", []))) or "not recorded"
    return f"""---
library_name: transformers
tags: [tomoe, moe, vllm]
---

# {config.base_model_name}, {widths.active_ratio(shape):.0%} active (ToMoE)

Converted from **{config.base_model_name}** by [ToMoE](https://arxiv.org/abs/2501.15316): the dense weights are
unchanged; routers choose, per token, which of them are used.

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
| base model hash | `{config.base_model_hash}` |

## Use

```
pip install "tomoe-vllm[gpu]"
vllm serve ./this-folder --trust-remote-code
```

or, with transformers alone: `AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)` (the readable
reference: exact, not fast). `tomoe_provenance.json` holds the resolved run config and versions.
"""
