"""Tokenizers: a checkpoint reads text as its base does, whatever class transformers chose for the base."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tomoe_training.artifacts import tokenizer_files
from tomoe_training.artifacts.export import export_checkpoint
from tomoe_training.artifacts.tokenizer_files import copy_tokenizer, first_difference, load_tokenizer
from transformers import AutoTokenizer

from tests.helpers.dense_models import dense_model, save_dense_model
from tests.helpers.runs import assignments
from tests.helpers.students import save_untrained_adapter

TEXT = "the quick brown fox jumps over the lazy dog and we need to add nine and six because people do every day\n" * 60
SPECIAL = ["<s>", "</s>", "<unk>"]
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s>\n{% endfor %}"


def _byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def _sentencepiece(legacy):
    """As LLaMA-2's and Mistral's tokenizer.json: spaces are U+2581, with or without one before the text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    prepend = [normalizers.Prepend("▁")] if legacy else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if legacy else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    special = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=400, special_tokens=special))
    return tokenizer


LAYOUTS = {
    "byte level": _byte_level,
    "sentencepiece": lambda: _sentencepiece(False),
    "legacy sentencepiece": lambda: _sentencepiece(True),
}
CLASSES = [
    "LlamaTokenizerFast", "LlamaTokenizer", "Qwen2Tokenizer", "GPT2TokenizerFast", "CodeGenTokenizer",
    "PreTrainedTokenizerFast", None,
]  # fmt: skip


def _save_tokenizer(folder, layout, class_name):
    LAYOUTS[layout]().save(str(folder / "tokenizer.json"))
    if class_name is not None:
        fields = {"tokenizer_class": class_name, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(fields))


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """``bases(family)``: config.json of a dense model and of a checkpoint of it, without tokenizers."""
    made = {}

    def get(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            save_dense_model(folder / "dense", family, vocab_size=500)
            save_untrained_adapter(folder / "adapter", folder / "dense")
            export_checkpoint(
                folder / "dense", folder / "adapter", folder / "out", width_multiple=8, head_dim_multiple=4
            )
            made[family] = [(folder / name / "config.json").read_text() for name in ("dense", "out")]
        return made[family]

    return get


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "phi"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpoint_reads_text_as_its_base(family, layout, bases, tmp_path):
    """The model type decides on the class of the base, so copied files are not enough."""
    texts = ["we need to add", "<s>[INST] we need [/INST]", "  we  need", "a\nb", "</s>the fox", "1234", ""]
    for class_name in CLASSES:
        dense, out = tmp_path / f"dense-{class_name}", tmp_path / f"out-{class_name}"
        for folder, config in zip((dense, out), bases(family), strict=True):
            folder.mkdir()
            (folder / "config.json").write_text(config)
        _save_tokenizer(dense, layout, class_name)
        copy_tokenizer(dense, out)
        base, copy = AutoTokenizer.from_pretrained(dense), AutoTokenizer.from_pretrained(out)
        for text in texts:
            assert copy(text).input_ids == base(text).input_ids, (class_name, text)
            assert copy.decode(copy(text).input_ids) == base.decode(base(text).input_ids), (class_name, text)


def test_file_is_unchanged_where_it_is_right(dense_folder, adapter_folder, tmp_path):
    export_checkpoint(dense_folder(), adapter_folder(), tmp_path / "out", width_multiple=8, head_dim_multiple=4)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (dense_folder() / name).read_bytes()


def test_export_that_would_read_otherwise_is_refused(dense_folder, adapter_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_files, "first_difference", lambda a, b: "'x' as [1] instead of [2]")
    with pytest.raises(
        ValueError, match=r"cannot be exported: the checkpoint would read 'x' as \[1\] instead of \[2\]"
    ):
        export_checkpoint(dense_folder(), adapter_folder(), tmp_path / "out", width_multiple=8, head_dim_multiple=4)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", ["template", "special token", "prefix space", "lowercase"])
def test_every_difference_is_found(change, dense_folder, tmp_path):
    tokenizer, other = load_tokenizer(dense_folder()), load_tokenizer(dense_folder())
    assert first_difference(tokenizer, other) is None
    if change == "template":
        other.chat_template = TEMPLATE
    elif change == "special token":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    elif change == "prefix space":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.CharDelimiterSplit(" ")
    else:
        tokenizer.backend_tokenizer.normalizer = normalizers.Prepend("w")
    assert first_difference(tokenizer, other) is not None


# -------------------------------------------------------------------------------------------- loading
def _model_folder(folder, family="llama"):
    dense_model(family, vocab_size=500).save_pretrained(folder)
    return folder


def test_tokenizer_that_loses_spaces_is_told_at_training_time(tmp_path, caplog):
    """transformers' LlamaTokenizer overrides the byte-level parts of tokenizer.json."""
    base = _model_folder(tmp_path / "base")
    _save_tokenizer(base, "byte level", "LlamaTokenizerFast")
    load_tokenizer(base, warns=True)
    (record,) = caplog.records
    assert "LlamaTokenizer of transformers reads 'we need to add nine and six' as" in record.message
    assert "('weneedtoaddnineandsix')" in record.message
    assert "tokenizer.json says" in record.message
    caplog.clear()
    _save_tokenizer(base, "byte level", "PreTrainedTokenizerFast")  # the advice of the warning
    load_tokenizer(base, warns=True)
    assert caplog.records == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("none", r"has no tokenizer: add tokenizer\.json"),
        ("empty", r"the tokenizer of .* cannot be loaded"),
        ("truncated", r"the tokenizer of .* cannot be loaded"),
        ("own code", r"the tokenizer of .* cannot be loaded: .*trust_remote_code"),
        ("too long", r"has 300 tokens, the model 96: they do not belong together"),
    ],
)
def test_base_without_a_tokenizer_of_its_own_is_refused_in_the_dry_run(damage, message, config, run_cli, tmp_path):
    base = tmp_path / "base"
    dense_model("llama", **({} if damage == "too long" else {"vocab_size": 500})).save_pretrained(base)
    file = base / "tokenizer.json"
    if damage != "none":
        _save_tokenizer(base, "byte level", "PreTrainedTokenizerFast")
    if damage in ("empty", "truncated"):
        file.write_bytes(file.read_bytes()[: 0 if damage == "empty" else 2000])
    if damage == "own code":
        fields = {"tokenizer_class": "MyTokenizer", "auto_map": {"AutoTokenizer": ["own.MyTokenizer", None]}}
        (base / "tokenizer_config.json").write_text(json.dumps(fields))
    for extra in (["--dry-run"], []):
        code, _, error = run_cli("train", *assignments(config(base=str(base))), *extra, "--out", tmp_path / "out")
        assert code == 2
        assert error.count("\n") == 1
        with pytest.raises(ValueError, match=message):
            raise ValueError(error)
        assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------------------- other files
def test_files_that_belong_to_the_model_are_copied(adapter_folder, tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    save_dense_model(base, "llama")
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": TEMPLATE + "tools"}
    tokenizer.save_pretrained(base)
    names = [
        "LICENSE.txt",
        "LICENCE",
        "Licence.md",
        "USE_POLICY.md",
        "NOTICE",
        "processor_config.json",
        "qwen.tiktoken",
    ]
    for name in names:
        (base / name).write_text("{}")
    (base / "original").mkdir()
    (base / "README.md").write_text("the base's card")
    export_checkpoint(base, adapter_folder(), out, width_multiple=8, head_dim_multiple=4)
    assert {*names, "chat_template.jinja"} <= {file.name for file in out.iterdir()}
    assert [file.name for file in (out / "additional_chat_templates").iterdir()] == ["tool_use.jinja"]
    assert not (out / "original").exists()
    assert "the base's card" not in (out / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer.chat_template
