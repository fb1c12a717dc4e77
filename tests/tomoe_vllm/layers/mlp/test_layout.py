"""Availability of the shared layout on a GPU. For CPUs see tests/parity/test_expert_layout.py."""

import subprocess
import sys

import pytest

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
