"""The plugin as vLLM's own lookups see it, and the error of vLLM without the plugin."""

import os
import subprocess
import sys
from importlib.metadata import entry_points

import pytest
from vllm import ModelRegistry

from tests.helpers.tiny_models import save_tiny_model, tiny_config
from tomoe_vllm import plugin
from tomoe_vllm.hf.configuration_tomoe import CONFIG_CLASSES
from tomoe_vllm.hf.modeling_tomoe import MODEL_CLASSES

ARCHITECTURES = [model.__name__ for model in MODEL_CLASSES.values()]


def test_entry_point_is_registered():
    found = entry_points(group="vllm.general_plugins", name="tomoe")
    assert [entry.load() for entry in found] == [plugin.register]


def test_architectures_are_those_of_the_reference_models():
    assert plugin.architectures() == ARCHITECTURES


def test_registering_twice_changes_nothing():
    plugin.register()
    before = ModelRegistry.get_supported_archs()
    plugin.register()
    assert ModelRegistry.get_supported_archs() == before
    assert set(ARCHITECTURES) <= set(before)


def test_a_failure_is_logged_and_not_raised(monkeypatch, caplog):
    def fail(*args):
        raise RuntimeError("registry is broken")

    monkeypatch.setattr(ModelRegistry, "register_model", fail)
    plugin.register()
    assert "registry is broken" in caplog.text
    assert "\n" not in caplog.records[-1].getMessage()


@pytest.mark.process
def test_registering_imports_neither_the_model_nor_the_layers():
    code = (
        "import sys; from tomoe_vllm.plugin import register; register(); "
        "heavy = ('tomoe_vllm.models', 'tomoe_vllm.layers', 'tomoe_vllm.hf.modeling_tomoe'); "
        "found = [name for name in sys.modules if name.startswith(heavy)]; assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("family", CONFIG_CLASSES)
def test_vllm_finds_config_and_class_of_each_family(tmp_path, family):
    from vllm.config import ModelConfig

    plugin.register()
    config = tiny_config(family)
    config.save_pretrained(tmp_path)
    model_config = ModelConfig(str(tmp_path), skip_tokenizer_init=True)
    assert type(model_config.hf_config) is CONFIG_CLASSES[family]
    model_class, architecture = ModelRegistry.resolve_model_cls(config.architectures, model_config)
    assert f"{model_class.__module__}:{model_class.__name__}" == plugin.MODEL_CLASS
    assert architecture == config.architectures[0]
    info, _ = ModelRegistry.inspect_model_cls(config.architectures, model_config)
    assert info.is_text_generation_model
    assert info.supports_pp
    assert not info.is_pooling_model


# ------------------------------------------------------------------------------ without the plugin
def _save_with_code(folder):
    CONFIG_CLASSES["llama"].register_for_auto_class()
    MODEL_CLASSES["llama"].register_for_auto_class("AutoModelForCausalLM")
    try:
        save_tiny_model(folder, "llama")
    finally:
        CONFIG_CLASSES["llama"]._auto_class = MODEL_CLASSES["llama"]._auto_class = None


def _run_without_plugin(code: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"VLLM_PLUGINS": "", "VLLM_CPU_KVCACHE_SPACE": "1"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.process
def test_vllm_without_the_plugin_fails_with_one_line(tmp_path):
    _save_with_code(tmp_path)
    code = "import sys; from vllm import LLM; LLM(sys.argv[1], trust_remote_code=True, skip_tokenizer_init=True)"
    result = _run_without_plugin(code, str(tmp_path))
    assert result.returncode != 0
    last_line = result.stderr.strip().splitlines()[-1]
    assert last_line.startswith("ImportError: This is a ToMoE checkpoint")
    assert "pip install ./tomoe-vllm" in last_line


@pytest.mark.process
def test_transformers_loads_the_checkpoint_while_vllm_lacks_the_plugin(tmp_path):
    _save_with_code(tmp_path)
    code = (
        "import sys; from vllm import LLM, ModelRegistry; ModelRegistry.get_supported_archs(); "
        "from transformers import AutoModelForCausalLM; "
        "print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)).__name__)"
    )
    result = _run_without_plugin(code, str(tmp_path))
    assert result.stdout.strip().splitlines()[-1] == "ToMoELlamaForCausalLM", result.stderr
