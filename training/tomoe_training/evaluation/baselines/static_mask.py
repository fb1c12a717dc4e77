"""Static-mask baseline: one learned mask for all tokens, trained by this project's trainer.

Source: DISP-LLM (Gao et al., arXiv 2410.11988). It measures what ToMoE's dynamic structure adds.

Kept: The widths of each layer and the units kept in it are learned through a hypernetwork on the frozen
model, within the budget. All tokens have the same mask.

Simplified: It prunes the same units as ToMoE (neurons, and Q/K and V/O dims shared by all heads of a layer)
with ToMoE's objective, data and warm start. DISP-LLM also selects dims of the residual stream per layer.

Settings: ``num_experts = 1`` and ``vo_mode = static``. The balance and union losses have weight 0: with one
expert the former is constant, and the latter only measures the width, which the budget determines.
"""

from tomoe_training.config import RunConfig
from tomoe_training.evaluation.baselines.setup import BaselineSetup, MethodGates
from tomoe_training.evaluation.baselines.trained_adapter import train_adapter


def static_settings(config: RunConfig) -> RunConfig:
    """The same run with one mask for all tokens."""
    return config.model_copy(
        update={"num_experts": 1, "vo_mode": "static", "beta": 0.0, "gamma": 0.0, "init_adapter": None}
    )


def static_mask(setup: BaselineSetup) -> MethodGates:
    """Train on as many tokens as ToMoE."""
    return train_adapter(setup, static_settings(setup.config), setup.work / "static_mask")
