"""Wanda baseline: static structured pruning by weights times activations.

Source: Wanda (Sun et al., arXiv 2306.11695) in its structured form ("Wanda-sp" in FLAP, arXiv 2312.11983).

Kept: The score of an element is |W_ij| * ||X_j||, with the norm over calibration text. A unit's score is the
sum of its elements. All layers have the same widths. Nothing is trained.

Simplified: see structured.py. All norms come from the dense model. Wanda measures each layer on the outputs
of the layers already pruned.
"""

import torch
from torch import Tensor

from tomoe_training.evaluation.baselines.setup import BaselineSetup, MethodGates
from tomoe_training.evaluation.baselines.structured import InputNorms, prune


def wanda(setup: BaselineSetup) -> MethodGates:
    """Neurons, Q/K and V/O dims all pruned to the budget p."""
    norms, tokens = input_norms(setup)
    return prune(setup, norms, attention_ratio=setup.config.active_ratio, tokens=tokens)


def wanda_mlp(setup: BaselineSetup) -> MethodGates:
    """Neurons alone: attention stays dense, and the total budget is the same."""
    norms, tokens = input_norms(setup)
    return prune(setup, norms, attention_ratio=1.0, tokens=tokens)


def input_norms(setup: BaselineSetup) -> tuple[list[InputNorms], int]:
    """||X_j|| of every input of every layer over the calibration text, and the number of tokens."""
    family = setup.family
    paths = {
        "attention_in": family.attention_in,
        "attention_out": family.attention_out,
        "mlp_out": family.mlp_out,
    }
    squares: list[dict[str, Tensor]] = [{} for _ in setup.layers]

    def accumulate(layer: int, path: str, inputs: Tensor) -> None:
        total = inputs.square().sum(dim=0)
        squares[layer][path] = squares[layer].get(path, torch.zeros_like(total)) + total

    tokens = setup.observe(list(paths.values()), accumulate)
    return [InputNorms(**{name: layer[path].sqrt() for name, path in paths.items()}) for layer in squares], tokens
