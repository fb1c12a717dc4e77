"""Choice of the layout, on simulated GPUs. With an engine on a CPU: tests/parity/test_expert_layout.py."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.helpers.tiny_models import tiny_config
from tomoe_vllm.kernels.expert_mlp.triton import dispatch


@pytest.fixture
def registered(monkeypatch, tmp_path):
    """Calls of ``dispatch.register`` on "Some GPU"; validation records are read from an empty folder."""
    monkeypatch.setenv("TOMOE_CACHE_ROOT", str(tmp_path))
    monkeypatch.setattr(dispatch, "device_name", lambda: "Some GPU")
    calls = []
    monkeypatch.setattr(dispatch, "register", lambda: calls.append("register"))
    return calls


def test_shared_layout_on_a_gpu_needs_a_successful_validation(registered):
    from tomoe_vllm.layers.mlp.layout import why_not_shared_on_gpu

    assert "were not checked on this Some GPU; run: tomoe doctor" in why_not_shared_on_gpu()
    dispatch.write_validation("Some GPU", ["gather, 3 tokens: error 0.2 of 0.01"])
    assert "gather, 3 tokens" in why_not_shared_on_gpu()
    assert registered == []
    dispatch.write_validation("Some GPU", [])
    assert why_not_shared_on_gpu() is None
    assert registered == ["register"]


def test_the_record_is_read_under_the_name_that_doctor_writes_under_mig(registered, monkeypatch):
    """vLLM's platform gives NVML's name, the one of the whole GPU; torch gives that of the slice."""
    from vllm.platforms import current_platform

    from tomoe_vllm.layers.mlp.layout import why_not_shared

    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    monkeypatch.setattr(type(current_platform), "get_device_name", lambda *arguments: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(dispatch, "device_name", lambda: "NVIDIA A100-SXM4-80GB MIG 1g.10gb")
    with_config(monkeypatch)
    dispatch.write_validation(dispatch.device_name(), [])
    assert why_not_shared(None) is None


def test_importing_the_layout_does_not_import_triton_kernels():
    """CPU servers use the dispatch module for its thresholds; Triton may be missing there."""
    code = "import sys, tomoe_vllm.kernels.expert_mlp.triton.dispatch; print('triton' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def with_config(monkeypatch, *, max_num_seqs=64, max_num_batched_tokens=8192, num_speculative_tokens=None):
    """Simulate the config of a running engine."""
    from tomoe_vllm.layers.mlp import layout

    scheduler = SimpleNamespace(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)
    speculative = SimpleNamespace(num_speculative_tokens=num_speculative_tokens) if num_speculative_tokens else None
    config = SimpleNamespace(lora_config=None, scheduler_config=scheduler, speculative_config=speculative)
    monkeypatch.setattr(layout, "get_current_vllm_config", lambda: config)
    monkeypatch.setattr(layout, "get_tensor_model_parallel_world_size", lambda: 1)


@pytest.fixture
def validated_gpu(registered, monkeypatch, tmp_path):
    """A GPU on which ``tomoe doctor`` found the kernels right, without tuned tables."""
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    dispatch.write_validation("Some GPU", [])
    dispatch.load_thresholds.cache_clear()
    yield
    dispatch.load_thresholds.cache_clear()


def write_tables(config, **thresholds):
    from tomoe_vllm.layers.mlp.layout import layer_shapes

    for shape in layer_shapes(config):
        dispatch.write_table(shape, dispatch.Thresholds(**thresholds))
    dispatch.load_thresholds.cache_clear()


def test_after_doctor_alone_auto_keeps_the_masked_layout(validated_gpu, monkeypatch):
    from tomoe_vllm.layers.mlp.layout import choose_layout

    with_config(monkeypatch)
    layout, reason = choose_layout(tiny_config("llama"), None)
    assert layout == "masked"
    assert "it was not measured on this Some GPU; run: tomoe tune --model DIR" in reason
    assert choose_layout(tiny_config("llama", expert_layout="shared"), None)[0] == "shared"


@pytest.mark.parametrize(
    ("thresholds", "engine", "layout", "words"),
    [
        pytest.param((3, 640, 8192), {}, "shared", "gather up to 3 tokens and grouped from 640 to 8192", id="both"),
        pytest.param((0, 640, 8192), {}, "shared", "it is faster: grouped from 640 to 8192", id="grouped"),
        pytest.param((0, 10**9, 8192), {}, "masked", "no faster than dense for steps of 1 to 8192", id="neither"),
        pytest.param(
            (0, 640, 8192), {"max_num_batched_tokens": 512}, "masked", "for steps of 1 to 512 tokens", id="small steps"
        ),
        pytest.param(
            (3, 10**9, 8192), {"num_speculative_tokens": 3}, "masked", "for steps of 4 to 8192", id="speculation"
        ),
    ],
)
def test_auto_takes_shared_where_tune_measured_a_gain_for_a_reachable_step(
    validated_gpu, monkeypatch, thresholds, engine, layout, words
):
    from tomoe_vllm.layers.mlp.layout import choose_layout

    with_config(monkeypatch, **engine)
    config = tiny_config("llama")
    names = ("gather_tokens", "grouped_tokens", "max_tokens")
    write_tables(config, **dict(zip(names, thresholds, strict=True)))
    chosen, reason = choose_layout(config, None)
    assert chosen == layout
    assert words in reason


def test_the_layout_is_decided_and_logged_once_per_model(monkeypatch, caplog):
    """Free memory shrinks while layers are built, so a decision in each layer could mix layouts."""
    from tomoe_vllm.layers.mlp import layout

    answers = iter([("fused", "there is memory"), ("masked", "there is none any more")])
    monkeypatch.setattr(layout, "choose_layout", lambda *arguments: next(answers))
    monkeypatch.setattr(layout, "get_tensor_model_parallel_world_size", lambda: 1)
    with caplog.at_level("INFO"):
        assert layout.decide_layout(tiny_config("llama"), None) == "fused"
    assert [record.message for record in caplog.records] == ["ToMoE expert layout: fused, because there is memory"]


def test_ranks_that_would_choose_different_layouts_take_masked(monkeypatch, caplog):
    from tomoe_vllm.layers.mlp import layout

    monkeypatch.setattr(layout, "choose_layout", lambda *arguments: ("fused", "there is memory"))
    monkeypatch.setattr(layout, "gather_from_ranks", lambda value: [value, "masked"])
    with caplog.at_level("INFO"):
        assert layout.decide_layout(tiny_config("llama"), None) == "masked"
    assert "the tensor-parallel ranks would choose different layouts (fused, masked)" in caplog.text


@pytest.fixture
def a100(monkeypatch):
    """An A100 without a validation record, and a config of LLaMA-2 7B's size: (config, its vLLM config setter)."""
    import torch
    from vllm.platforms import current_platform

    monkeypatch.setattr(dispatch, "device_name", lambda: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    monkeypatch.setattr(torch, "get_default_dtype", lambda: torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**40, 2**40))
    return tiny_config(
        "llama", hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, head_dim=128, vocab_size=32_000, num_experts=8, value_router_dim=128,
        expert_intermediate_sizes=[5504] * 32, qk_head_dims=[128] * 32, vo_head_dims=[64] * 32,
    )  # fmt: skip


def decide(monkeypatch, config, **engine) -> str:
    from tomoe_vllm.layers.mlp import layout

    with_config(monkeypatch, **engine)
    monkeypatch.setattr(layout, "fused_parameters", lambda config: 2**20)
    return layout.decide_layout(config, None)


def test_a_masked_layout_that_is_predicted_slower_than_dense_says_so(a100, registered, monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "device_name", lambda: "NVIDIA A100-SXM4-80GB")
    with caplog.at_level("INFO"):
        assert decide(monkeypatch, a100) == "masked"
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert "the cost model predicts 0.96 x the dense model for a decode step of 1 token" in warning
    assert "NVIDIA A100-SXM4-80GB" in warning


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"vo_mode": "none"}, id="the router alone costs less than 3 %"),
        pytest.param({"expert_layout": "masked"}, id="asked for"),
        pytest.param({"device": "NVIDIA L4"}, id="nothing is known about the chip"),
    ],
)
def test_nothing_is_said_otherwise(a100, registered, monkeypatch, caplog, change):
    monkeypatch.setattr(dispatch, "device_name", lambda: change.get("device", "NVIDIA A100-SXM4-80GB"))
    for name, value in change.items():
        setattr(a100, name, value)
    assert decide(monkeypatch, a100) == "masked"
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []


@pytest.mark.parametrize(
    ("max_num_seqs", "device", "layout", "reason"),
    [
        pytest.param(1, "NVIDIA A100-SXM4-80GB", "fused", "enough free memory", id="one sequence"),
        pytest.param(
            2,
            "NVIDIA A100-SXM4-80GB",
            "masked",
            "predicts 0.96 x the dense model for a decode step of 2 tokens",
            id="two",
        ),
        pytest.param(2, "NVIDIA L4", "fused", "enough free memory", id="nothing is known about the chip"),
    ],
)
def test_auto_takes_fused_only_where_no_step_is_predicted_slower_than_dense(
    a100, registered, monkeypatch, caplog, max_num_seqs, device, layout, reason
):
    monkeypatch.setattr(dispatch, "device_name", lambda: device)
    with caplog.at_level("INFO"):
        assert decide(monkeypatch, a100, max_num_seqs=max_num_seqs) == layout
    assert reason in caplog.text


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
        pytest.param(3, 2**40, "up to 3 tokens are decoded at once", id="one sequence too many"),
        pytest.param(2, 6 * 2**20, "more than half of the 0.0 GiB that are free", id="not enough memory"),
    ],
)
def test_auto_takes_fused_only_for_few_sequences_and_with_free_memory(monkeypatch, max_num_seqs, free_bytes, reason):
    import torch
    from vllm.platforms import current_platform

    from tomoe_vllm.layers.mlp import layout

    with_config(monkeypatch, max_num_seqs=max_num_seqs)
    monkeypatch.setattr(layout, "fused_parameters", lambda config: 2**20)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free_bytes, free_bytes))
    monkeypatch.setattr(type(current_platform), "is_cuda", lambda self: True)
    found = layout.why_not_fused_in_auto(tiny_config("llama"), None)
    assert found is None if reason is None else reason in found
