"""Which load formats are refused. With engines: tests/parity/test_loading.py and test_reload.py."""

from typing import get_args

import pytest
import torch
from torch import nn


def test_formats_that_read_the_checkpoint_are_accepted():
    from vllm.model_executor.model_loader import LoadFormats

    from tomoe_vllm.models.loading import UNREADABLE_FORMATS, require_readable

    assert set(UNREADABLE_FORMATS) < set(get_args(LoadFormats))
    for load_format in set(get_args(LoadFormats)) - set(UNREADABLE_FORMATS):
        require_readable(load_format)


@pytest.mark.parametrize("load_format", ["ipc_cache", "runai_streamer_sharded", "sharded_state", "tensorizer"])
def test_formats_that_restore_parameters_are_refused(load_format):
    from tomoe_vllm.models.loading import require_readable

    with pytest.raises(ValueError, match=rf"--load-format {load_format} restores .* use --load-format auto"):
        require_readable(load_format)


def test_an_unknown_format_that_loads_no_tensor_is_refused():
    from vllm.model_executor.models.utils import WeightsMapper

    from tomoe_vllm.models.loading import StrictLoader

    options = {"mapper": WeightsMapper(), "packed_modules": {}, "is_tied": False, "is_quantized": False}
    loader = StrictLoader(nn.Linear(2, 2), load_format="custom", why_not_reloadable=None, **options)
    with pytest.raises(ValueError, match=r"--load-format custom did not load"):
        loader.finish()
    assert not StrictLoader(nn.Linear(2, 2), load_format="dummy", why_not_reloadable=None, **options).finish()


@pytest.mark.parametrize("name", ["inv_freq", "cos_cached", "sin_cached"])
def test_rotary_buffers_of_old_checkpoints_are_ignored_as_by_vllm(name):
    from vllm.model_executor.models.utils import WeightsMapper

    from tomoe_vllm.models.loading import StrictLoader

    options = {"mapper": WeightsMapper(), "packed_modules": {}, "is_tied": False, "is_quantized": False}
    loader = StrictLoader(nn.Linear(2, 2), load_format="auto", why_not_reloadable=None, **options)
    weights = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
    buffer = {f"model.layers.0.self_attn.rotary_emb.{name}": torch.ones(4)}
    assert loader.load((weights | buffer).items()) == {"weight", "bias"}
    with pytest.raises(ValueError, match="holds unused 1 tensor"):
        StrictLoader(nn.Linear(2, 2), load_format="auto", why_not_reloadable=None, **options).load(
            (weights | {"model.other": torch.ones(4)}).items()
        )


def test_a_model_does_not_run_between_new_weights_and_the_end_of_a_reload(monkeypatch):
    """An error in vLLM's own processing of the weights would leave it there."""
    from vllm.model_executor.models.utils import WeightsMapper

    from tomoe_vllm.models import loading

    options = {"mapper": WeightsMapper(), "packed_modules": {}, "is_tied": False, "is_quantized": False}
    loader = loading.StrictLoader(nn.Linear(2, 2), load_format="auto", why_not_reloadable=None, **options)
    weights = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}
    loader.load(weights.items())
    assert not loader.finish()
    monkeypatch.setattr(loading, "is_reloading", lambda model: True)
    loader.load({}.items())
    assert loader.failure is None, "no tensor came"
    loader.load(weights.items())
    assert loader.failure == "reloading the weights did not end"
    assert loader.finish()
    assert loader.failure is None
