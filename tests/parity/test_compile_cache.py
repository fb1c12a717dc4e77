"""vLLM's compile caches tell apart what shapes ToMoE's graph: layout and thresholds, with real engines.

CUDA's compile mode (VLLM_COMPILE with inductor, artifacts on disk) is forced on the CPU platform.
"""

import dataclasses

import pytest

from tests.helpers.tiny_models import save_tiny_model
from tests.parity.conftest import max_logprob_difference, start_engine
from tests.parity.test_compile import TWO_LAYERS
from tests.parity.test_families import LOGPROB_LIMIT
from tomoe_vllm.kernels import build
from tomoe_vllm.kernels.expert_mlp.triton import dispatch

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.fixture(autouse=True)
def compile_mode_of_cuda(monkeypatch, tmp_path):
    from vllm.compilation.passes.utility.fix_functionalization import FixFunctionalizationPass
    from vllm.config import CompilationMode
    from vllm.platforms.cpu import CpuPlatform

    on_cpu = CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls, config):
        on_cpu(cls, config)
        compilation = config.compilation_config
        compilation.mode, compilation.backend = CompilationMode.VLLM_COMPILE, "inductor"
        for field in dataclasses.fields(compilation.pass_config):  # passes for CUDA's fused ops
            if isinstance(getattr(compilation.pass_config, field.name), bool):
                object.__setattr__(compilation.pass_config, field.name, False)
        compilation.splitting_ops = compilation.splitting_ops or list(compilation._attention_ops)
        compilation.compile_sizes = compilation.compile_sizes or []

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(check_and_update_config))
    monkeypatch.setattr(FixFunctionalizationPass, "__call__", lambda self, graph: None)  # it names ops of CUDA
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))


@pytest.fixture
def run(tmp_path, prompts):
    """``run(not_shared)``: serve a few prompts -> (class of the MLPs, whether the graph was loaded, stored graphs).

    ``not_shared``: why the shared layout is unavailable, or None. The config is the same: the layout follows from the
    machine, as it does after ``tomoe doctor`` has run.
    """
    from tomoe_vllm.layers.mlp import layout

    model = save_tiny_model(tmp_path / "model", "llama", **TWO_LAYERS)
    artifacts = tmp_path / "cache" / "torch_compile_cache" / "torch_aot_compile"

    def facts(model) -> tuple[str, bool]:
        return type(model.model.layers[0].mlp).__name__, model.model.was_aot_compile_fn_loaded_from_disk

    def start(not_shared: str | None) -> tuple[str, bool, int]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(layout, "why_not_shared", lambda quant_config: not_shared)
            with start_engine(tmp_path / "model", enforce_eager=False) as engine:
                mlp, is_loaded = engine.inspect(facts)
                assert max_logprob_difference(model, engine.complete(prompts[:4])) < LOGPROB_LIMIT
        return mlp, is_loaded, len(list(artifacts.iterdir()))

    return start


def test_layout_and_thresholds_have_graphs_of_their_own_and_equal_settings_share_one(run, monkeypatch):
    if build.compiler() is None:
        pytest.skip("no C++ compiler")
    assert run("no validation record") == ("ToMoEMaskedMLP", False, 1)
    assert run(None) == ("ToMoESharedMLP", False, 2)  # as after `tomoe doctor`
    tuned = dispatch.Thresholds(gather_tokens=3, grouped_tokens=640, max_tokens=8192)
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "load_thresholds", lambda shape: tuned)
        assert run(None) == ("ToMoESharedMLP", False, 3)  # as after `tomoe tune`
        assert run(None) == ("ToMoESharedMLP", True, 3)
