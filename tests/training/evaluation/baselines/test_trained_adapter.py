"""Gates of an adapter: those that an export would have, and the notes about its training."""

import dataclasses

import pytest
import torch
from tomoe_training.artifacts.adapter import Adapter
from tomoe_training.artifacts.export import export_checkpoint
from tomoe_training.evaluation.baselines.trained_adapter import adapter_gates, tomoe
from tomoe_training.evaluation.perplexity import load_model

from tests.helpers.dense_models import save_dense_model


@pytest.mark.parametrize("vo_mode", ["dynamic", "static", "none"])
def test_gates_give_the_logits_of_the_exported_adapter(vo_mode, make_setup, adapter_folder, dense_folder, tmp_path):
    setup = make_setup(active_ratio=0.7)
    adapter = adapter_folder(vo_mode=vo_mode)
    gates = tomoe(dataclasses.replace(setup, adapter=adapter))
    gates.attach(setup.base)
    gates.set_on(True)
    export_checkpoint(
        dense_folder(), adapter, tmp_path / "out", active_ratio=0.7, width_multiple=8, head_dim_multiple=4
    )
    ids = torch.randint(3, 90, (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(setup.base(ids).logits, load_model(tmp_path / "out")(ids).logits)


def test_other_training_data_is_noted(make_setup, adapter_folder, tmp_path):
    setup = make_setup()
    assert adapter_gates(setup, adapter_folder()).note == "trained on none"
    adapter = Adapter.load(adapter_folder())
    adapter.config.training = {"data": ["text.txt"], "tokens": 640, "seconds": 2.5}
    adapter.save(tmp_path / "same")
    gates = adapter_gates(setup, tmp_path / "same")
    assert (gates.note, gates.tokens, gates.seconds) == ("", 640, 2.5)


def test_adapter_of_another_base_is_refused(make_setup, adapter_folder, tmp_path):
    save_dense_model(tmp_path / "other", "llama", seed=5)
    with pytest.raises(ValueError, match="the adapter was trained on llama"):
        adapter_gates(make_setup(base=str(tmp_path / "other")), adapter_folder())
