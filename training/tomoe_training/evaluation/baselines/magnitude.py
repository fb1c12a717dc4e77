"""Rival: static structured pruning by weight magnitude, without any data.

Stands for: magnitude pruning in its structured form ("Mag-sp" of FLAP, An et al., arXiv 2312.11983).
Kept: a unit's score is the sum of |W| over its column of the output matrix; every layer is pruned alike.
Simplified: see structured.py. Both forms are given: all parts pruned to p, and attention left dense.
"""

import torch

from tomoe_training.evaluation.baselines.setup import Contest, MethodGates
from tomoe_training.evaluation.baselines.structured import InputNorms, prune


def magnitude(contest: Contest) -> MethodGates:
    """Neurons, Q/K and V/O dims all pruned to the budget p."""
    return prune(contest, _ones(contest), attention_ratio=contest.config.active_ratio, tokens=0)


def magnitude_mlp(contest: Contest) -> MethodGates:
    """Neurons alone: attention stays dense, within the same total budget."""
    return prune(contest, _ones(contest), attention_ratio=1.0, tokens=0)


def _ones(contest: Contest) -> list[InputNorms]:
    shape, device = contest.shape, contest.base.device
    ones = InputNorms(
        attention_in=torch.ones(shape.hidden_size, device=device),
        attention_out=torch.ones(shape.num_heads * shape.head_dim, device=device),
        mlp_out=torch.ones(shape.intermediate_size, device=device),
    )
    return [ones] * len(contest.layers)
