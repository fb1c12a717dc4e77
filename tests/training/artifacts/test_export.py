"""Export: dense bytes are unchanged, and the checkpoint gives the student's outputs.

What the trained gates compute and what the exported files compute are two paths; they meet here.
"""

import json
import signal

import pytest
import torch
from safetensors.torch import load_file
from tomoe_training.artifacts.export import SHIPPED_CODE, TOMOE_SHARD, export_checkpoint
from tomoe_training.artifacts.inspection import inspect

from tests.helpers.compare import assert_close, is_close
from tests.helpers.dense_models import FAMILIES, save_dense_model
from tests.helpers.processes import environment, python, start_python
from tests.helpers.students import gated_logits, random_student, save_untrained_adapter
from tomoe_vllm.hf.modeling_tomoe import MODEL_CLASSES
from tomoe_vllm.hf.tomoe_math import unpack_signature

TINY = {"width_multiple": 8, "head_dim_multiple": 4}


def _ids(length=16):
    return torch.randint(3, 90, (2, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def _logits(model, ids):
    return model(ids, use_cache=False).logits


@pytest.fixture
def exported(dense_folder, adapter_folder, tmp_path):
    export_checkpoint(dense_folder(), adapter_folder(), tmp_path / "out", **TINY)
    return tmp_path / "out"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("vo_mode", ["dynamic", "static", "none"])
def test_exported_model_equals_the_gated_training_model(family, vo_mode, dense_folder, tmp_path):
    base = dense_folder(family)
    student = save_untrained_adapter(tmp_path / "adapter", base, vo_mode=vo_mode)
    expected = gated_logits(student, _ids())
    widths = export_checkpoint(base, tmp_path / "adapter", tmp_path / "out", **TINY)
    assert widths == student.widths
    model = MODEL_CLASSES[family].from_pretrained(tmp_path / "out").eval()
    assert_close(_logits(model, _ids()), expected)
    student.set_gates(False)
    assert not is_close(_logits(model, _ids()), _logits(student.base, _ids()), limit=0.1)


@pytest.mark.parametrize("num_experts", [1, 9, 16, 24])
def test_other_expert_counts_survive_the_export(num_experts, dense_folder, tmp_path):
    student = save_untrained_adapter(tmp_path / "adapter", dense_folder(), num_experts=num_experts)
    expected = gated_logits(student, _ids())
    export_checkpoint(dense_folder(), tmp_path / "adapter", tmp_path / "out", **TINY)
    assert_close(_logits(MODEL_CLASSES["llama"].from_pretrained(tmp_path / "out").eval(), _ids()), expected)


def test_tolerance_catches_one_expert_one_neuron_wider(exported, dense_folder):
    expected = gated_logits(random_student(dense_folder()), _ids())
    model = MODEL_CLASSES["llama"].from_pretrained(exported).eval()
    assert is_close(_logits(model, _ids()), expected)
    signature = model.model.layers[0].mlp.expert_gate.signature
    dropped = (signature & 0b1111 != 0b1111).flatten().nonzero()[0]
    signature[dropped] |= 0b1111
    assert not is_close(_logits(model, _ids()), expected)


def test_dense_file_is_linked_and_byte_identical(exported, dense_folder):
    ours, theirs = exported / "model-dense.safetensors", dense_folder() / "model.safetensors"
    assert ours.stat().st_ino == theirs.stat().st_ino
    assert ours.read_bytes() == theirs.read_bytes()


def test_sharded_base_keeps_its_shards(adapter_folder, tmp_path):
    base = tmp_path / "base"
    save_dense_model(base, "llama", max_shard_size="60KB")
    shards = sorted(p.name for p in base.glob("*.safetensors"))
    adapter = adapter_folder()  # of the same tensors in one file
    export_checkpoint(base, adapter, tmp_path / "out", **TINY)
    assert sorted(p.name for p in (tmp_path / "out").glob("*.safetensors")) == sorted([*shards, TOMOE_SHARD])
    for shard in shards:
        assert (tmp_path / "out" / shard).read_bytes() == (base / shard).read_bytes()
    assert inspect(tmp_path / "out")["kind"] == "checkpoint"


def test_index_lists_every_tensor_once(exported):
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    held = {n: f.name for f in exported.glob("*.safetensors") for n in load_file(f)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for f in exported.glob("*.safetensors") for t in load_file(f).values()
    )


def test_checkpoint_describes_itself(exported, dense_folder, adapter_folder):
    config = json.loads((exported / "config.json").read_text())
    dense = json.loads((dense_folder() / "config.json").read_text())
    assert config["architectures"] == ["ToMoELlamaForCausalLM"]
    assert config["auto_map"]["AutoModelForCausalLM"] == "modeling_tomoe.ToMoELlamaForCausalLM"
    kept = dense.keys() - {"model_type", "architectures", "transformers_version"}
    assert {k: config[k] for k in kept} == {k: dense[k] for k in kept}
    names = {p.name for p in exported.iterdir()}
    assert {*SHIPPED_CODE, "tokenizer.json", "tokenizer_config.json", "README.md", "tomoe_provenance.json"} <= names
    hash_ = json.loads((adapter_folder() / "adapter_config.json").read_text())["base_model_hash"]
    assert config["base_model_hash"] == hash_
    assert hash_ in (exported / "README.md").read_text()


def test_every_expert_has_exactly_the_width_of_the_config(exported):
    config = json.loads((exported / "config.json").read_text())
    tensors = load_file(exported / TOMOE_SHARD)
    for i in range(2):
        masks = unpack_signature(tensors[f"model.layers.{i}.mlp.expert_gate.signature"], 4)
        assert masks.sum(-1).tolist() == [config["expert_intermediate_sizes"][i]] * 4
        dims = tensors[f"model.layers.{i}.self_attn.head_gate.query_key_dims"]
        assert dims.sum().item() == config["qk_head_dims"][i]


@pytest.mark.parametrize("p", [0.35, 0.5, 0.8, 1.0])
def test_one_adapter_exports_at_other_budgets(p, dense_folder, adapter_folder, tmp_path):
    export_checkpoint(
        dense_folder(), adapter_folder(), tmp_path / "out", active_ratio=p, width_multiple=1, head_dim_multiple=2
    )
    facts = inspect(tmp_path / "out")
    assert p - 0.01 <= facts["active_ratio"] <= p
    assert facts["active_ratio_target"] == p


@pytest.mark.process
def test_checkpoint_loads_without_this_package(dense_folder, tmp_path):
    for family in FAMILIES:
        student = save_untrained_adapter(tmp_path / f"{family}-adapter", dense_folder(family))
        export_checkpoint(dense_folder(family), tmp_path / f"{family}-adapter", tmp_path / family, **TINY)
        torch.save(gated_logits(student, _ids()), tmp_path / f"{family}.pt")
    torch.save(_ids(), tmp_path / "ids.pt")
    code = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tomoe_vllm", "training"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocked())
import torch
from transformers import AutoModelForCausalLM
ids = torch.load("ids.pt")
for family in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained("./" + family, trust_remote_code=True).eval()
    assert type(model).__module__.startswith("transformers_modules"), type(model)
    with torch.no_grad():
        torch.save(model(ids, use_cache=False).logits, family + "-remote.pt")
        cached = model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=None)
        grown = ids
        for _ in range(6):
            grown = torch.cat([grown, model(grown, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    assert cached.tolist() == grown.tolist(), family
assert not any(name.partition(".")[0] in ("tomoe_vllm", "training") for name in sys.modules)
print("fine")
"""
    result = python("-c", code, *FAMILIES, cwd=tmp_path, env=environment(PYTHONPATH="", HF_HOME=str(tmp_path / "hf")))
    assert result.stdout.endswith("fine\n"), result.stderr
    for family in FAMILIES:
        assert_close(torch.load(tmp_path / f"{family}-remote.pt"), torch.load(tmp_path / f"{family}.pt"))


@pytest.mark.process
def test_interrupted_export_leaves_no_output(dense_folder, adapter_folder, tmp_path):
    code = """
import time, tomoe_training.artifacts.export
def slow(*args, **kwargs):
    print("saving", flush=True)
    time.sleep(60)
tomoe_training.artifacts.export.write_tensors = slow
from tomoe_vllm.cli import main
main()
"""
    command = ["export", "--base", dense_folder(), "--adapter", adapter_folder(), "--out", tmp_path / "out"]
    process = start_python("-c", code, *command, "--width-multiple", 8, "--head-dim-multiple", 4)
    assert process.stdout.readline() == "saving\n"
    assert [p.name.startswith("out.tmp-") for p in tmp_path.iterdir()] == [True]  # it was under way
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "tomoe: interrupted\n")
    assert list(tmp_path.iterdir()) == []


def test_two_exports_of_one_adapter_are_identical(exported, dense_folder, adapter_folder, tmp_path):
    export_checkpoint(dense_folder(), adapter_folder(), tmp_path / "again", **TINY)
    for name in (TOMOE_SHARD, "config.json", "model.safetensors.index.json"):
        assert (tmp_path / "again" / name).read_bytes() == (exported / name).read_bytes()
