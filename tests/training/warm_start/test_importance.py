"""Importance equals the KL of a perturbed mask, to second order."""

import pytest
import torch
import torch.nn.functional as F
from tomoe_training.base_model import use_causal_attention
from tomoe_training.warm_start import importance
from tomoe_training.warm_start.importance import measure_importance

from tests.helpers.students import random_student

TOKEN = 5


def _kl_of_scaling(base, layer, module, position, columns, ids, epsilon=0.05):
    """2 KL / epsilon^2 with one set of columns of a linear's input scaled by 1 - epsilon at one position, each."""
    with torch.no_grad():
        dense = F.log_softmax(base(ids).logits[0].double(), dim=-1)

        def scale(_, args):
            values = args[0].clone()
            for row, column in enumerate(columns):
                values[row, position, column] *= 1 - epsilon
            return (values,)

        handle = layer.get_submodule(module).register_forward_pre_hook(scale)
        masked = F.log_softmax(base(ids.expand(len(columns), -1)).logits.double(), dim=-1)
        handle.remove()
    return 2 / epsilon**2 * (dense.exp() * (dense - masked)).sum(dim=(1, 2))


def _mean_importance(student, ids, field, num_draws):
    draws = [getattr(measure_importance(student, [ids], seed)[1], field)[TOKEN].float() for seed in range(num_draws)]
    return torch.stack(draws).mean(dim=0)


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_importance_of_a_neuron_is_the_kl_of_a_small_mask_change(family, dense_folder):
    student = random_student(dense_folder(family))
    base, layer = student.base, student.base.model.layers[1]
    student.set_gates(False)
    ids = torch.randint(3, 90, (1, 12), generator=torch.Generator().manual_seed(1))
    columns = list(range(student.shape.intermediate_size))
    module = "mlp.down_proj" if family == "llama" else "mlp.fc2"
    expected = _kl_of_scaling(base, layer, module, TOKEN, columns, ids)
    measured = _mean_importance(student, ids, "neurons", num_draws=150).double()
    assert measured.sum().item() == pytest.approx(expected.sum().item(), rel=0.25)
    assert torch.corrcoef(torch.stack([measured, expected]))[0, 1] > 0.8


def test_importance_of_a_value_dim_is_that_of_all_heads_at_once(dense_folder):
    student = random_student(dense_folder("llama"))
    base, layer, head_dim = student.base, student.base.model.layers[1], student.shape.head_dim
    student.set_gates(False)
    ids = torch.randint(3, 90, (1, 12), generator=torch.Generator().manual_seed(2))
    columns = [list(range(a, student.shape.num_heads * head_dim, head_dim)) for a in range(head_dim)]
    expected = _kl_of_scaling(base, layer, "self_attn.o_proj", TOKEN, columns, ids)
    measured = _mean_importance(student, ids, "value", num_draws=150).double()
    assert measured.sum().item() == pytest.approx(expected.sum().item(), rel=0.25)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi"])
def test_every_family_is_measured_completely(family, dense_folder):
    student = random_student(dense_folder(family))
    shape = student.shape
    layers = measure_importance(student, [torch.randint(3, 90, (2, 16)), torch.randint(3, 90, (1, 16))])
    assert len(layers) == len(student.head_gates)
    for layer in layers:
        assert layer.neurons.shape == (48, shape.intermediate_size)
        assert layer.value.shape == (48, shape.head_dim)
        assert layer.mlp_in.shape == layer.attention_in.shape == (48, shape.hidden_size)
        assert layer.query_key.shape == (shape.num_units,)
        assert layer.query_key.min() >= 0
        assert layer.query_key.sum() > 0


def test_importance_is_deterministic(dense_folder):
    student = random_student(dense_folder("llama"))
    ids = torch.randint(3, 90, (2, 16))
    first, second = (measure_importance(student, [ids])[0] for _ in range(2))
    assert torch.equal(first.neurons, second.neurons)
    assert torch.equal(first.query_key, second.query_key)


def test_chosen_layers_are_recorded_as_with_all_others(dense_folder):
    student = random_student(dense_folder("llama"))
    ids = [torch.randint(3, 90, (2, 16)), torch.randint(3, 90, (1, 16))]
    whole = measure_importance(student, ids)
    (second,) = measure_importance(student, ids, layers=range(1, 2))
    for name in ("attention_in", "mlp_in", "neurons", "value", "query_key"):
        assert torch.equal(getattr(second, name), getattr(whole[1], name))
    assert measure_importance(student, ids, layers=range(0)) == []


def test_records_stay_on_the_models_device(dense_folder, monkeypatch):
    """They are what the gates there are fitted to. "meta" stands for "cuda": a copy to the CPU raises."""
    student = random_student(dense_folder("llama"))
    use_causal_attention(student.base, 16)
    student.base.to("meta")
    student.to("meta")
    monkeypatch.setattr(importance, "_sampled_gradient", lambda hidden, *_: torch.zeros_like(hidden))
    generator = torch.Generator()
    monkeypatch.setattr(torch, "Generator", lambda device: generator)  # "meta" has none
    for layer in measure_importance(student, [torch.zeros(2, 16, dtype=torch.long, device="meta")]):
        assert {getattr(layer, name).device.type for name in vars(layer)} == {"meta"}
