"""Choice of the layout, on simulated GPUs. With an engine on a CPU: tests/parity/test_expert_layout.py."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.helpers.tiny_models import tiny_config
from tomoe_vllm.kernels.expert_mlp.triton import dispatch


@pytest.fixture
def registered(monkeypatch, tmp_path):
    """Calls of ``dispatch.register``; validation records are read from an empty folder."""
    monkeypatch.setenv("TOMOE_CACHE_ROOT", str(tmp_path))
    calls = []
    monkeypatch.setattr(dispatch, "register", lambda: calls.append("register"))
    return calls


def test_shared_layout_on_a_gpu_needs_a_successful_validation(registered):
    from tomoe_vllm.layers.mlp.layout import why_not_shared_on_gpu

    assert "run: tomoe doctor" in why_not_shared_on_gpu("Some GPU")
    dispatch.write_validation("Some GPU", ["gather, 3 tokens: error 0.2 of 0.01"])
    assert "gather, 3 tokens" in why_not_shared_on_gpu("Some GPU")
    assert registered == []
    dispatch.write_validation("Some GPU", [])
    assert why_not_shared_on_gpu("Some GPU") is None
    assert registered == ["register"]


def test_importing_the_layout_does_not_import_triton_kernels():
    """CPU servers use the dispatch module for its thresholds; Triton may be missing there."""
    code = "import sys, tomoe_vllm.kernels.expert_mlp.triton.dispatch; print('triton' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


@pytest.fixture
def choose(monkeypatch):
    """``choose_layout`` for a requested layout; ``unavailable`` maps "shared", "fused" and "auto fused" to reasons."""
    from tomoe_vllm.layers.mlp import layout

    def run(requested: str, **unavailable: str):
        monkeypatch.setattr(layout, "why_not_shared", lambda quant_config: unavailable.get("shared"))
        monkeypatch.setattr(layout, "why_not_fused", lambda config, quant_config: unavailable.get("fused"))
        monkeypatch.setattr(layout, "why_not_fused_in_auto", lambda config, quant_config: unavailable.get("auto_fused"))
        return layout.choose_layout(tiny_config("llama", expert_layout=requested), None)

    return run


@pytest.mark.parametrize(
    ("unavailable", "layout", "reasons"),
    [
        pytest.param({}, "shared", [], id="shared comes first"),
        pytest.param({"shared": "no kernels"}, "fused", ["no kernels"], id="then fused"),
        pytest.param(
            {"shared": "no kernels", "auto_fused": "no memory"}, "masked", ["no kernels", "no memory"], id="then masked"
        ),
    ],
)
def test_auto_takes_the_first_available_layout_and_explains_it(choose, unavailable, layout, reasons):
    chosen, explanation = choose("auto", **unavailable)
    assert chosen == layout
    assert all(reason in explanation for reason in reasons)


@pytest.mark.parametrize("layout", ["shared", "masked", "fused"])
def test_an_available_layout_is_used_when_requested(choose, layout):
    assert choose(layout, auto_fused="not in auto")[0] == layout


@pytest.mark.parametrize("layout", ["shared", "fused"])
def test_an_unavailable_layout_is_refused_with_the_reason(choose, layout):
    with pytest.raises(ValueError, match=f"expert_layout is '{layout}', but no kernels; use 'auto' or 'masked'"):
        choose(layout, **{layout: "no kernels"})


@pytest.mark.parametrize(
    ("max_num_seqs", "free_bytes", "reason"),
    [
        pytest.param(2, 2**40, None, id="few sequences and enough memory"),
        pytest.param(3, 2**40, "up to 3 sequences are decoded at once", id="one sequence too many"),
        pytest.param(2, 6 * 2**20, "more than half of the 0.0 GiB that are free", id="not enough memory"),
    ],
)
def test_auto_takes_fused_only_for_few_sequences_and_with_free_memory(monkeypatch, max_num_seqs, free_bytes, reason):
    import torch
    from vllm.platforms import current_platform

    from tomoe_vllm.layers.mlp import layout

    config = SimpleNamespace(lora_config=None, scheduler_config=SimpleNamespace(max_num_seqs=max_num_seqs))
    monkeypatch.setattr(layout, "get_current_vllm_config", lambda: config)
    monkeypatch.setattr(layout, "fused_parameters", lambda config: 2**20)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free_bytes, free_bytes))
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)
    found = layout.why_not_fused_in_auto(tiny_config("llama"), None)
    assert found is None if reason is None else reason in found
