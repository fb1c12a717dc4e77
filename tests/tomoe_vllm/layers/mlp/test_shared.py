"""Names of the execution paths of the shared layout, as metrics report them."""

from types import SimpleNamespace

import pytest

from tomoe_vllm.kernels.expert_mlp.triton.dispatch import Thresholds


@pytest.mark.parametrize(
    ("device", "num_tokens", "path"),
    [
        ("cpu", 3, "shared_rows"),
        ("cuda", 3, "shared_gather"),
        ("cuda", 4, "shared_dense"),
        ("cuda", 640, "shared_grouped"),
    ],
)
def test_step_path_depends_on_the_device_and_on_its_thresholds(monkeypatch, device, num_tokens, path):
    from tomoe_vllm.layers.mlp import shared

    tuned = Thresholds(gather_tokens=3, grouped_tokens=640, max_tokens=8192)
    monkeypatch.setattr(shared, "load_thresholds", lambda shape: tuned)
    monkeypatch.setattr(shared.LayerShape, "of", lambda weights: None)
    widths = SimpleNamespace(device=SimpleNamespace(type=device))
    mlp = SimpleNamespace(expert_gate=SimpleNamespace(widths=widths), weights=None)
    assert shared.ToMoESharedMLP.step_path(mlp, num_tokens) == path
