"""The models that engines load: a dense one and ToMoE of it, whichever was given."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tomoe_vllm.diagnostics.bench.checkpoints import write_dense, write_tomoe
from tomoe_vllm.diagnostics.full.engine_models import EVERY_PATH, TINY_SHAPE, make_models
from tomoe_vllm.diagnostics.full.plan import Options
from tomoe_vllm.hf.register import register_with_transformers
from tomoe_vllm.kernels.expert_mlp.triton.dispatch import LayerShape, read_table


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A dense model, and ToMoE of it."""
    folder = tmp_path_factory.mktemp("given")
    write_dense(TINY_SHAPE, folder / "dense")
    write_tomoe(folder / "dense", folder / "tomoe")
    return folder


def logits(folder):
    register_with_transformers()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([[5, 6, 7, 8]])).logits


@pytest.mark.parametrize("kind", ["dense", "tomoe"])
def test_the_other_model_is_made_of_the_given_one(kind, given, tmp_path):
    facts = make_models(Options(model=str(given / kind), interpret=True, scratch=str(tmp_path)))
    assert facts["model"] == kind
    assert torch.equal(logits(tmp_path / "dense"), logits(given / "dense"))
    assert AutoConfig.from_pretrained(tmp_path / "tomoe").model_type == "tomoe_llama"
    if kind == "tomoe":
        assert torch.equal(logits(tmp_path / "tomoe"), logits(given / "tomoe"))


def test_the_shared_layout_of_the_model_uses_every_kernel(given, tmp_path):
    make_models(Options(model=str(given / "tomoe"), interpret=True, scratch=str(tmp_path)))
    shape = LayerShape(hidden_size=128, num_neurons=192, num_experts=8, width=96, num_matrices=3, dtype=torch.bfloat16)
    assert read_table(shape, tmp_path / "tuned")[96] == EVERY_PATH
    assert {EVERY_PATH.path(tokens) for tokens in (1, 64, 2048)} == {"gather", "dense", "grouped"}
