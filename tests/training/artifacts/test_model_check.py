"""Model folders that are refused before anything is loaded, and those that load as transformers loads them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tomoe_training.artifacts.export import export_checkpoint
from tomoe_training.artifacts.inspection import inspect
from tomoe_training.artifacts.model_check import check_model, load_base_config, model_name, model_tensors
from tomoe_training.artifacts.safetensors_io import fingerprint
from tomoe_training.base_model import load_base
from transformers import AutoModelForCausalLM

from tests.helpers.dense_models import FAMILIES, save_dense_model
from tests.helpers.runs import assignments
from tests.helpers.students import save_untrained_adapter
from tomoe_vllm.hf.register import register_with_transformers

INPUT = torch.arange(3, 35)[None]
TINY = {"width_multiple": 8, "head_dim_multiple": 4}


@torch.no_grad()
def _logits(model):
    return model.eval()(INPUT, use_cache=False).logits


def _load(folder):
    register_with_transformers()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _base(folder, family="llama", **fields):
    save_dense_model(folder, family, **fields)
    return folder


def _edit_tensors(base, edit):
    file = base / "model.safetensors"
    tensors = load_file(file)
    save_file(edit(tensors) or tensors, file, metadata={"format": "pt"})


def _edit_config(base, **fields):
    config = json.loads((base / "config.json").read_text()) | fields
    (base / "config.json").write_text(json.dumps(config))


def _without(*names):
    return lambda tensors: {name: t for name, t in tensors.items() if name not in names}


def _prefixed(prefix):
    return lambda tensors: {prefix + name: t for name, t in tensors.items()}


INCOMPLETE = {
    "an MLP tensor": (
        _without("model.layers.1.mlp.up_proj.weight"),
        r"lacks the tensor model\.layers\.1\.mlp\.up_proj",
    ),
    "a norm": (_without("model.norm.weight"), r"lacks the tensor model\.norm\.weight"),
    "an untied head": (_without("lm_head.weight"), r"lacks the tensor lm_head\.weight"),
    "compiled": (_prefixed("_orig_mod."), r"lacks the tensor .* and \d+ more .* such as _orig_mod\.model"),
    "DDP": (_prefixed("module."), r"lacks the tensor .* such as module\.model"),
    "PEFT": (_prefixed("base_model.model."), r"lacks the tensor .* such as base_model\.model\.model"),
}


@pytest.fixture(params=INCOMPLETE)
def incomplete(request, tmp_path):
    """A base with missing tensors, and the error's pattern. transformers would fill it with random numbers."""
    edit, message = INCOMPLETE[request.param]
    base = _base(tmp_path / "base", "mistral")
    _edit_tensors(base, edit)
    return base, message


def test_incomplete_model_is_refused_by_every_command(incomplete, config, adapter_folder, text_file, run_cli, tmp_path):
    base, _ = incomplete
    out = tmp_path / "out"
    run = assignments(config(base=str(base)))
    commands = {
        "dry run": ["train", *run, "--dry-run", "--out", out],
        "train": ["train", *run, "--out", out],
        "export": ["export", "--base", base, "--adapter", adapter_folder("mistral"), "--out", out],
        "eval": ["eval", "ppl", "--model", base, "--text", text_file, "--block-size", 32],
    }
    for name, command in commands.items():
        code, stdout, error = run_cli(*command)
        assert (code, stdout) == (2, ""), name
        assert error.startswith(f"tomoe: {base} lacks the tensor "), name
        assert error.count("\n") == 1, name
        assert not out.exists(), name


def test_error_names_what_is_missing_and_what_is_there_instead(incomplete):
    base, message = incomplete
    with pytest.raises(ValueError, match=message):
        check_model(base)


def test_checkpoint_with_fewer_layers_than_its_config_is_refused(tmp_path):
    base = _base(tmp_path / "base")
    _edit_config(base, num_hidden_layers=3, layer_types=None)
    with pytest.raises(ValueError, match=r"lacks the tensor model\.layers\.2"):
        check_model(base)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 90}, r"embed_tokens\.weight is \[96, 64\] and its config\.json says \[90, 64\]"),
        ({"intermediate_size": 128}, r"_proj\.weight is .*96.* and its config\.json says .*128"),
        ({"num_key_value_heads": 4}, r"k_proj\.weight is \[32, 64\] and its config\.json says \[64, 64\]"),
        ({"num_attention_heads": 5}, r"config\.json is not valid"),
    ],
)
def test_config_of_another_size_is_refused(fields, message, tmp_path):
    base = _base(tmp_path / "base")
    _edit_config(base, **fields)
    with pytest.raises(ValueError, match=message):
        check_model(base)


def test_incomplete_checkpoint_is_not_fine_tuned_or_scored(dense_folder, adapter_folder, text_file, run_cli, tmp_path):
    out = tmp_path / "out"
    export_checkpoint(dense_folder(), adapter_folder(), out, **TINY)
    tensors = load_file(out / "model-dense.safetensors")
    tensors.pop("model.layers.0.mlp.up_proj.weight")
    (out / "model-dense.safetensors").unlink()  # a hard link to the base's
    save_file(tensors, out / "model-dense.safetensors", metadata={"format": "pt"})
    for command in (
        ["finetune", "--model", out, "--data", text_file, "--out", tmp_path / "tuned"],
        ["eval", "ppl", "--model", out, "--text", text_file, "--block-size", 32],
    ):
        code, _, error = run_cli(*command)
        assert code == 2
        assert error == f"tomoe: {out} lacks the tensor model.layers.0.mlp.up_proj.weight of its config.json: " + (
            "export it again\n"
        )
    assert not (tmp_path / "tuned").exists()


# --------------------------------------------------------------------------------- tensors that do not belong
def _more_layers(base):
    _edit_config(base, num_hidden_layers=2)  # of 3


def _frequencies(base):
    _edit_tensors(
        base, lambda t: t | {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(8) for i in range(2)}
    )


def _peft_file(base):
    save_file({"base_model.model.q_proj.lora_A.weight": torch.ones(4, 64)}, base / "adapter_model.safetensors")


def _consolidated_file(base):
    save_file({"layers.0.attention.wq.weight": torch.ones(4, 64)}, base / "consolidated.safetensors")


def _bare_decoder(base):
    _edit_tensors(base, lambda tensors: {name.removeprefix("model."): t for name, t in tensors.items()})


def _head_instead_of_embeddings(base):
    _edit_tensors(base, lambda t: {"lm_head.weight": t.pop("model.embed_tokens.weight")} | t)


def _equal_head(base):
    _edit_tensors(base, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].clone()})


def _other_head(base):
    _edit_tensors(base, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].flip(0).contiguous()})


def _half_with_double_norms(base):
    _edit_tensors(base, lambda t: {n: x.double() if "norm" in n else x.half() for n, x in t.items()})
    _frequencies(base)  # so that the file is written anew


ODD = [
    _more_layers, _frequencies, _peft_file, _consolidated_file, _bare_decoder, _head_instead_of_embeddings, _equal_head,
    _other_head, _half_with_double_norms,
]  # fmt: skip


@pytest.mark.parametrize("change", ODD, ids=lambda change: change.__name__.strip("_"))
def test_export_of_an_odd_base_holds_the_model_that_transformers_loads(change, tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    _base(base, num_hidden_layers=3) if change is _more_layers else _base(base)
    change(base)
    dense = _load(base)
    trained = load_base(base, load_base_config(base), torch.float32, torch.device("cpu"), is_sharded=False)
    assert torch.equal(_logits(trained), _logits(dense))
    save_untrained_adapter(tmp_path / "adapter", base)
    export_checkpoint(base, tmp_path / "adapter", out, active_ratio=1.0, **TINY)
    assert torch.equal(_logits(_load(out)), _logits(dense))
    config = json.loads((out / "config.json").read_text())
    stored = {name for file in out.glob("*.safetensors") for name in load_file(file)}
    expected = set(dense.state_dict()) - ({"lm_head.weight"} if config["tie_word_embeddings"] else set())
    assert {name for name in stored if "_gate." not in name} - {"lm_head.weight"} == expected - {"lm_head.weight"}
    assert "lm_head.weight" in stored or config["tie_word_embeddings"]
    assert inspect(out)["kind"] == "checkpoint"


def test_ignored_tensors_are_said_once(dense_folder, caplog, tmp_path):
    base = _base(tmp_path / "base", num_hidden_layers=3)
    _edit_config(base, num_hidden_layers=2)
    model_tensors(base, load_base_config(base), warns=True)
    assert [r.message for r in caplog.records] == [
        f"{base} stores 9 tensors that its config.json does not use, such as "
        "model.layers.2.input_layernorm.weight: they are ignored"
    ]


def test_same_tensor_under_two_names_is_refused(tmp_path):
    base = _base(tmp_path / "base")
    _edit_tensors(base, lambda t: t | {"norm.weight": t["model.norm.weight"].clone()})
    with pytest.raises(ValueError, match=r"holds model\.norm\.weight twice, as .*norm\.weight and as .*norm\.weight"):
        check_model(base)


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_models_of_all_families_pass(family, dense_folder):
    check_model(dense_folder(family))


# --------------------------------------------------------------------------------- quantized, and not a model
@pytest.mark.parametrize(
    ("fields", "method"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"load_in_8bit": True}}, "quantization_config"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, "fp8"),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
            "compressed-tensors",
        ),
        ({"compression_config": {"format": "int-quantized"}}, "int-quantized"),
        ("quantize_config.json", "quantize_config.json"),
        ("hf_quant_config.json", "hf_quant_config.json"),
        (torch.float8_e4m3fn, "is F8_E4M3"),
        (torch.int8, "is I8"),
    ],
)
def test_quantized_base_is_refused_in_the_dry_run(fields, method, config, run_cli, tmp_path):
    base = _base(tmp_path / "base")
    if isinstance(fields, dict):
        _edit_config(base, **fields)
    elif isinstance(fields, str):
        (base / fields).write_text("{}")
    else:
        _edit_tensors(base, lambda t: {n: x.to(fields) if "_proj" in n else x for n, x in t.items()})
    out = tmp_path / "out"
    for extra in (["--dry-run"], []):
        code, _, error = run_cli("train", *assignments(config(base=str(base))), *extra, "--out", out)
        assert code == 2
        assert error.startswith(f"tomoe: {base} is quantized (")
        assert method in error
        assert error.endswith("give the model that it was made from, in bfloat16, float16 or float32\n")
        assert not out.exists()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda base: (base / "config.json").unlink(), "is not a model folder: it has no config.json"),
        (lambda base: (base / "config.json").write_text("{"), r"config\.json is damaged"),
        (lambda base: (base / "config.json").write_text("[]"), r"config\.json is damaged: it holds no JSON object"),
        (lambda base: _edit_config(base, model_type="gpt2"), "'gpt2' is not a supported family"),
        (lambda base: (base / "model.safetensors").unlink(), r"has no \.safetensors file: it has no weights"),
        (lambda base: (base / "adapter_config.json").write_text("{}"), "holds a PEFT adapter"),
        (lambda base: _edit_config(base, num_attention_heads=0), r"config\.json is not valid"),
        (lambda base: _edit_config(base, hidden_size="64"), r"config\.json is not valid"),
    ],
)
def test_folder_that_is_no_model_is_refused_in_the_dry_run(edit, message, config, tmp_path):
    from tomoe_training.dry_run import dry_run

    base = _base(tmp_path / "base")
    edit(base)
    with pytest.raises((ValueError, OSError), match=message):
        dry_run(config(base=str(base)))


def test_peft_folder_as_base_is_told_so(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(FileNotFoundError, match=r"no config\.json \(a PEFT adapter\? Merge it into its model first\)"):
        load_base_config(tmp_path)


# ----------------------------------------------------------------------------------------------------- names
def test_model_is_named_after_its_folder_or_its_hub_repository(tmp_path, monkeypatch):
    folder = tmp_path / "my model"
    snapshot = tmp_path / "models--meta-llama--Llama-2-7b-hf" / "snapshots" / "01ab45"
    for path in (folder, snapshot):
        path.mkdir(parents=True)
    monkeypatch.chdir(folder)
    (tmp_path / "link").symlink_to(folder)
    for path in (folder, f"{folder}/", ".", "../my model", "../link"):
        assert model_name(type(folder)(path)) == "my model"
    assert model_name(snapshot) == "meta-llama/Llama-2-7b-hf"


def test_hub_snapshot_of_links_is_a_base(dense_folder, tmp_path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "01ab"
    for folder in (blobs, snapshot):
        folder.mkdir(parents=True)
    for number, file in enumerate(dense_folder().iterdir()):
        shutil.copy(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    check_model(snapshot)
    assert fingerprint(snapshot) == fingerprint(dense_folder())
