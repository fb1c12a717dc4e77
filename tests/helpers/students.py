"""Students with random gates on tiny dense models: everything an export needs, without training."""

from pathlib import Path

import torch
from tomoe_training.artifacts.adapter import Adapter, AdapterConfig
from tomoe_training.artifacts.safetensors_io import fingerprint
from tomoe_training.config import MethodSettings
from tomoe_training.method.student import Student
from transformers import AutoModelForCausalLM

from tomoe_vllm.hf.configuration_tomoe import base_model_type

SETTINGS = {
    "active_ratio": 0.6,
    "num_experts": 4,
    "value_router_dim": 16,
    "width_multiple": 8,
    "head_dim_multiple": 4,
}


def settings(**fields) -> MethodSettings:
    """Method settings that suit the tiny models."""
    return MethodSettings(**(SETTINGS | fields))


def random_student(folder: Path, *, seed: int = 0, **fields) -> Student:
    """A student of the dense model in ``folder`` whose masks differ by layer, expert and token."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    torch.manual_seed(seed)
    student = Student(base, settings(**fields))
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "up" in name or "router" in name or "value_down" in name:
                parameter.mul_(8.0)
            if name.endswith("offset"):
                parameter.add_(torch.randn_like(parameter))
    student.calibrate(torch.randint(3, 90, (2, 32)))
    return student


def adapter_of(student: Student, folder: Path) -> Adapter:
    """The adapter of a student of the dense model in ``folder``."""
    options = student.settings
    config = AdapterConfig(
        base_model_name=folder.name,
        base_model_hash=fingerprint(folder),
        base_model_type=base_model_type(student.base.config),
        num_layers=student.base.config.num_hidden_layers,
        num_experts=options.num_experts,
        value_router_dim=options.value_router_dim,
        vo_mode=options.vo_mode,
        active_ratio=options.active_ratio,
        training={"steps": 0, "tokens": 0, "data": ["none"]},
    )
    return Adapter(config=config, layers=student.layer_adapters())


def save_untrained_adapter(out: Path, base: Path, **fields) -> Student:
    """Save the adapter of :func:`random_student`; returns the student."""
    student = random_student(base, **fields)
    adapter_of(student, base).save(out)
    return student


@torch.no_grad()
def gated_logits(student: Student, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits of the student as it would be exported: exact widths, no noise, gates on."""
    student.update_widths()
    student.set_gates(True)
    student.make_masks()
    return student.base(input_ids, use_cache=False).logits
