"""Gates of trained adapters, with the masks that an export would write: ToMoE, and baselines that use the trainer."""

import copy
from pathlib import Path

from tomoe_training.artifacts.adapter import Adapter
from tomoe_training.artifacts.export import check_base, plan_widths, tomoe_tensors
from tomoe_training.config import RunConfig
from tomoe_training.evaluation.baselines.setup import BaselineSetup, MethodGates
from tomoe_training.trainer import train
from tomoe_vllm.hf.modeling_tomoe import ExpertGate, HeadGate, ToMoEExpertGate, ToMoEHeadGate


def tomoe(setup: BaselineSetup) -> MethodGates:
    """ToMoE from its adapter, or trained on the run's tokens."""
    if setup.adapter is None:
        return train_adapter(setup, setup.config, setup.work / "tomoe")
    return adapter_gates(setup, setup.adapter)


def train_adapter(setup: BaselineSetup, config: RunConfig, out: Path) -> MethodGates:
    """Train (or resume) a run and load its gates."""
    train(config, out)
    return adapter_gates(setup, out)


def adapter_gates(setup: BaselineSetup, folder: Path) -> MethodGates:
    """The reference model's gates with the widths and masks that ``tomoe export`` would write.

    Raises ``ValueError`` for an adapter of another base model.
    """
    adapter, settings, shape = Adapter.load(folder), setup.config, setup.shape
    check_base(adapter, Path(settings.base))
    widths = plan_widths(adapter, shape, settings.active_ratio, settings.width_multiple, settings.head_dim_multiple)
    config = copy.copy(setup.base.config)
    for name in ("num_experts", "value_router_dim", "vo_mode"):
        setattr(config, name, getattr(adapter.config, name))
    config.vo_head_dims = widths.vo_dims
    heads: list[HeadGate] = []
    experts: list[ExpertGate] = []
    for i, layer in enumerate(adapter.layers):
        head, expert = ToMoEHeadGate(config, i), ToMoEExpertGate(config, i)
        tensors = tomoe_tensors(layer, i, widths, shape)
        for gate, marker in ((head, ".head_gate."), (expert, ".expert_gate.")):
            gate.load_state_dict({n.partition(marker)[2]: t for n, t in tensors.items() if marker in n})
        heads.append(head.eval())
        experts.append(expert.eval())
    done = adapter.config.training
    names = [Path(source).name for source in settings.data]
    note = "" if done.get("data") == names else f"trained on {', '.join(done.get('data', ['unknown data']))}"
    return MethodGates(
        heads=heads,
        experts=experts,
        widths=widths,
        tokens=done.get("tokens", 0),
        seconds=done.get("seconds"),
        note=note,
    )
