"""Compiling the C++ kernels: no warnings, and one line where it fails."""

import pytest
import torch

from tomoe_vllm.kernels import build


def test_without_a_compiler_ops_stay_in_torch_with_a_warning(monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    build.load.cache_clear()
    try:
        assert not build.load()
        assert "plain torch, which is slower: no C++ compiler was found" in caplog.text
    finally:
        build.load.cache_clear()


def test_a_failing_compiler_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setenv("TOMOE_CACHE_ROOT", str(tmp_path))
    with pytest.raises(build.BuildError, match=r"false failed: exit code 1"):
        build.build()


@pytest.mark.slow
@pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
def test_the_kernels_compile_without_warnings(monkeypatch):
    """For this CPU; test_vectors_of_other_cpus_agree_too does the same for others."""
    own = build.ISA_FLAGS.get(torch.backends.cpu.get_cpu_capability(), ())
    monkeypatch.setitem(build.ISA_FLAGS, "strict", (*own, "-Werror"))
    build.build("strict")


def test_the_library_depends_on_torchs_version(monkeypatch, tmp_path):
    monkeypatch.setenv("TOMOE_CACHE_ROOT", str(tmp_path))
    monkeypatch.setattr(build, "compile_library", lambda cxx, flags, sources, library: library.touch())
    first = build.build()
    assert build.build() == first
    monkeypatch.setattr(build.torch, "__version__", "0.0")
    assert build.build() != first
