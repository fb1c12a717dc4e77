"""The table of dispatch thresholds of a device."""

import pytest

from tomoe_vllm.kernels.expert_mlp.triton.thresholds import Thresholds, device_name, load_thresholds


def test_thresholds_of_this_device_are_read_from_the_named_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("TOMOE_TUNED_CONFIG_FOLDER", str(tmp_path))
    file = tmp_path / f"{device_name()}.json"
    try:
        file.write_text('{"gather_tokens": 3, "grouped_tokens": 5}')
        load_thresholds.cache_clear()
        assert load_thresholds() == Thresholds(gather_tokens=3, grouped_tokens=5)
        file.write_text('{"gather_tokens": 3}')
        load_thresholds.cache_clear()
        with pytest.raises(ValueError, match="it must hold gather_tokens, grouped_tokens"):
            load_thresholds()
    finally:
        load_thresholds.cache_clear()
