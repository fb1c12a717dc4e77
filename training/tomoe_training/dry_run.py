"""``tomoe train --dry-run``: the resolved settings, and the parameter counts they mean."""

import sys
from pathlib import Path

import torch
import yaml
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tomoe_training.artifacts.model_check import load_base_config, model_tensors
from tomoe_training.artifacts.tokenizer_files import check_vocabulary, load_tokenizer
from tomoe_training.config import RunConfig
from tomoe_training.documents import check_source
from tomoe_training.method.student import Student
from tomoe_vllm.hf.configuration_tomoe import base_model_type, block_shape


def dry_run(run: RunConfig) -> dict:
    """Resolve a run without weights or data: counts come from modules built on the meta device.

    The base's config is read from its folder, or from the run's ``architecture`` (recipes carry one).
    """
    config = _base_config(run)
    shape, num_layers = block_shape(config), config.num_hidden_layers
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config)
        student = Student(base, run)
    num_trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    kept = num_layers * shape.router_parameters(run.num_experts, run.value_router_dim, run.vo_mode)
    print(yaml.safe_dump(run.model_dump(), sort_keys=False), file=sys.stderr)
    return {
        "model_type": base_model_type(config),
        "dense_parameters": sum(p.numel() for p in base.parameters()),
        "total_block_parameters": shape.total_parameters * num_layers,
        "active_block_parameters_at_most": int(run.active_ratio * shape.total_parameters * num_layers),
        "trained_parameters": num_trained,
        "kept_parameters": kept,
        "tokens": run.steps * run.batch_size * run.sequence_length,
        "config": {k: v for k, v in run.model_dump().items() if k not in ("architecture", "notes")},
    }


def _base_config(run: RunConfig):
    base = Path(run.base)
    if run.architecture is None or base.joinpath("config.json").is_file():
        if not run.base or not base.exists():
            raise FileNotFoundError(f"{run.base or 'the base'} does not exist, and the run has no `architecture`")
        config = load_base_config(base)
        model_tensors(base, config, warns=True)
        tokenizer = load_tokenizer(base, warns=True)
        check_vocabulary(tokenizer, config.vocab_size, base)
        for source in run.data:
            check_source(source, run.text_column, tokenizer)
        return config
    fields = dict(run.architecture)
    model_type = fields.pop("model_type", "")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"architecture.model_type is {model_type!r}, which transformers does not know")
    config = CONFIG_MAPPING[model_type](**fields)
    base_model_type(config)
    return config
