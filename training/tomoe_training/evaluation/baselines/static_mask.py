"""Rival: one learned mask for all tokens, by this project's own trainer.

Stands for: DISP-LLM (Gao et al., arXiv 2410.11988), and the paper's question what dynamic structure adds.
Kept: widths of every layer and what is kept in it are learned on the frozen model through a hypernetwork,
within the budget; the mask is the same for every token.
Simplified: it prunes what ToMoE prunes (neurons, Q/K and V/O dims alike in all heads of a layer), with
ToMoE's objective, data and warm start; DISP-LLM also selects other residual-stream dims per layer.
Settings: num_experts = 1 and vo_mode = static; the union and balance terms say nothing about one expert.
"""

from tomoe_training.config import RunConfig
from tomoe_training.evaluation.baselines.setup import Contest, MethodGates
from tomoe_training.evaluation.baselines.trained_adapter import train_adapter


def static_settings(config: RunConfig) -> RunConfig:
    """The same run with one mask for all tokens."""
    return config.model_copy(
        update={"num_experts": 1, "vo_mode": "static", "beta": 0.0, "gamma": 0.0, "init_adapter": None}
    )


def static_mask(contest: Contest) -> MethodGates:
    """Train for the same tokens as ToMoE."""
    return train_adapter(contest, static_settings(contest.config), contest.work / "static_mask")
