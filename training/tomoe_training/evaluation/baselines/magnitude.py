"""Magnitude baseline: static structured pruning by weight magnitude, without data.

Source: magnitude pruning in its structured form ("Mag-sp" in FLAP, An et al., arXiv 2312.11983).

Kept: A unit's score is the sum of |W| over its column of the output matrix. All layers have the same widths.

Simplified: see structured.py. There are two forms: all parts pruned to p, and neurons alone.
"""

import torch

from tomoe_training.evaluation.baselines.setup import BaselineSetup, MethodGates
from tomoe_training.evaluation.baselines.structured import InputNorms, prune


def magnitude(setup: BaselineSetup) -> MethodGates:
    """Neurons, Q/K and V/O dims all pruned to the budget p."""
    return prune(setup, _ones(setup), attention_ratio=setup.config.active_ratio, tokens=0)


def magnitude_mlp(setup: BaselineSetup) -> MethodGates:
    """Neurons alone: attention stays dense, and the total budget is the same."""
    return prune(setup, _ones(setup), attention_ratio=1.0, tokens=0)


def _ones(setup: BaselineSetup) -> list[InputNorms]:
    shape, device = setup.shape, setup.base.device
    ones = InputNorms(
        attention_in=torch.ones(shape.hidden_size, device=device),
        attention_out=torch.ones(shape.num_heads * shape.head_dim, device=device),
        mlp_out=torch.ones(shape.intermediate_size, device=device),
    )
    return [ones] * len(setup.layers)
