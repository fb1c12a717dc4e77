"""Rival: static structured pruning by weights times activations.

Stands for: Wanda (Sun et al., arXiv 2306.11695) in its structured form ("Wanda-sp" of FLAP, arXiv 2312.11983).
Kept: an element's score is |W_ij| * ||X_j||, the norm taken over calibration text; a unit's score is their
sum; every layer is pruned alike; nothing is trained.
Simplified: see structured.py; and the norms are those of the dense model throughout, where Wanda measures
each layer on the outputs of the layers already pruned.
"""

import torch
from torch import Tensor

from tomoe_training.evaluation.baselines.setup import Contest, MethodGates
from tomoe_training.evaluation.baselines.structured import InputNorms, prune


def wanda(contest: Contest) -> MethodGates:
    """Neurons, Q/K and V/O dims all pruned to the budget p."""
    norms, tokens = input_norms(contest)
    return prune(contest, norms, attention_ratio=contest.config.active_ratio, tokens=tokens)


def wanda_mlp(contest: Contest) -> MethodGates:
    """Neurons alone: attention stays dense, within the same total budget."""
    norms, tokens = input_norms(contest)
    return prune(contest, norms, attention_ratio=1.0, tokens=tokens)


def input_norms(contest: Contest) -> tuple[list[InputNorms], int]:
    """||X_j|| of every input of every layer over the calibration text, and its tokens."""
    family = contest.family
    paths = {
        "attention_in": family.attention_in,
        "attention_out": family.attention_out,
        "mlp_out": family.mlp_out,
    }
    squares: list[dict[str, Tensor]] = [{} for _ in contest.layers]

    def see(layer: int, path: str, inputs: Tensor) -> None:
        seen = inputs.square().sum(dim=0)
        squares[layer][path] = squares[layer].get(path, torch.zeros_like(seen)) + seen

    tokens = contest.observe(list(paths.values()), see)
    return [InputNorms(**{name: layer[path].sqrt() for name, path in paths.items()}) for layer in squares], tokens
