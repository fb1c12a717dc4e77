"""A checkpoint quantized as compressed-tensors int8 (W8A8): linears in int8, gates untouched."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.tiny_models import save_tiny_model
from tests.parity.conftest import logprob_differences, start_engine

pytestmark = pytest.mark.engine

WEIGHTS = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False}
ACTIVATIONS = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
LARGEST = 63
"""Of a weight: without VNNI oneDNN adds two products in 16 bits, where 2 x 255 x 63 fits and 2 x 255 x 127 does not."""
QUANTIZATION = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": ACTIVATIONS}},
}


def save_quantized(folder, family):
    """Save a checkpoint whose linears are int8; returns the reference model with the same, dequantized weights."""
    model = save_tiny_model(folder, family)
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name.endswith(("proj.weight", "fc1.weight", "fc2.weight", "dense.weight")):
            scale = tensor.abs().amax(dim=1, keepdim=True) / LARGEST
            quantized = (tensor / scale).round().to(torch.int8)
            tensors |= {name: quantized, f"{name}_scale": scale}
            model.state_dict()[name].copy_(quantized.float() * scale)
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": QUANTIZATION}))
    return model


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_int8_linears_agree_with_dequantized_weights(tmp_path, prompts, family):
    model = save_quantized(tmp_path, family)
    with start_engine(tmp_path, dtype="bfloat16") as engine:  # int8 kernels on CPU take no float32
        completions = engine.complete(prompts[:6])

    def typical() -> float:
        # bf16 alone gives 0.06 nats here, int8 activations 0.01 more; near a border an expert may flip.
        return torch.cat([logprob_differences(model, completion) for completion in completions]).median().item()

    assert typical() < 0.1
    model.set_gates(False)
    assert typical() > 0.5, "the tolerance must catch a model without its masks"


def test_missing_gate_of_a_quantized_checkpoint_is_named(tmp_path):
    save_quantized(tmp_path, "llama")
    name = "model.layers.1.mlp.expert_gate.signature"
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks 1 tensor \\({name}\\)"), start_engine(tmp_path, dtype="bfloat16"):
        pass
