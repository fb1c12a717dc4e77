"""Which rows of ``tomoe bench`` are not expected to be faster than dense, and by how much the cost model says so.

Speeds are predicted for ToMoE on the GPUs of ``roofline.CHIPS`` (``step_cost.py``: arithmetic). Elsewhere only the
paths are named that do all the work of the dense MLP.
"""

from typing import Any

from transformers import PreTrainedConfig

from tomoe_vllm.diagnostics.roofline import chip_named
from tomoe_vllm.diagnostics.step_cost import ModelShape, Step, speed

DENSE_PATHS = ("masked", "shared_dense")
"""Execution paths that read and multiply all neurons."""


def predict(results: dict[str, Any], config: PreTrainedConfig, gpu: str | None) -> None:
    """Add ``predicted_ratio`` to the rows of ``results`` where the cost model knows the GPU.

    ``config``: of the ToMoE model. ``gpu``: torch's name of the GPU, None on a CPU.
    """
    chip = chip_named(gpu) if gpu else None
    if chip is None:
        return
    model = ModelShape.of(config, itemsize=2)
    for part, name in (("decode", "batch"), ("prefill", "prompt_tokens")):
        for row in results.get(part, []):
            step = Step(num_tokens=row[name], is_prefill=part == "prefill")
            row["predicted_ratio"] = round(speed(model, row["path"].replace("_", " "), step, chip), 3)


def not_expected_faster(results: dict[str, Any]) -> list[str]:
    """One line for each row that is predicted to be no faster than dense, or whose path does the work of dense."""
    lines = []
    for part, name in (("decode", "batch"), ("prefill", "prompt_tokens")):
        for row in results.get(part, []):
            predicted = row.get("predicted_ratio")
            if predicted is not None and predicted <= 1:
                reason = f"is predicted to run at {predicted:.2f} x dense"
            elif predicted is None and row["path"] in DENSE_PATHS:
                reason = "reads and multiplies all neurons like the dense MLP"
            else:
                continue
            lines.append(f"not expected to be faster: {part}, {name} {row[name]}: the path {row['path']} {reason}")
    return lines
