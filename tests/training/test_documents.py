"""Sources of training text: what is read, and errors that name the source, the row and the column."""

import json

import pytest
from tomoe_training.documents import alpaca_text, check_source, load_documents

from tests.helpers.dense_models import word_tokenizer


def _write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ------------------------------------------------------------------------------------------ sources
def test_alpaca_template_with_input():
    row = {"instruction": "Add them. ", "input": "2 and 3", "output": " 5"}
    assert alpaca_text(row) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd them.\n\n### Input:\n2 and 3\n\n### Response:\n5"
    )


@pytest.mark.parametrize("row", [{"input": ""}, {"input": "  "}, {"input": None}, {}])
def test_alpaca_template_without_input(row):
    assert alpaca_text({"instruction": "Say {hi}.", "output": "Hi"} | row) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nSay {hi}.\n\n### Response:\nHi"
    )


def test_text_file_is_one_document(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("w0 w1\n\nw2\n")
    assert load_documents(str(file))["text"] == ["w0 w1\n\nw2\n"]


def test_jsonl_text_column_is_taken_and_others_dropped(tmp_path):
    file = _write_jsonl(tmp_path / "a.jsonl", [{"text": "w0", "n": 1}, {"text": "w1", "n": 2}])
    documents = load_documents(file)
    assert documents.column_names == ["text"]
    assert documents["text"] == ["w0", "w1"]


def test_instruction_rows_become_alpaca_text(tmp_path):
    rows = [{"instruction": "a", "input": "b", "output": "c"}, {"instruction": "d", "input": "", "output": "e"}]
    documents = load_documents(_write_jsonl(tmp_path / "a.jsonl", rows))
    assert documents["text"] == [alpaca_text(row) for row in rows]


def test_named_column_goes_over_the_default(tmp_path):
    file = _write_jsonl(tmp_path / "a.jsonl", [{"text": "no", "body": "yes"}])
    assert load_documents(file, "body")["text"] == ["yes"]


def test_parquet_file_is_read(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": ["w0", "w1"]}).to_parquet(tmp_path / "a.parquet")
    assert load_documents(str(tmp_path / "a.parquet"))["text"] == ["w0", "w1"]


def test_data_set_of_the_hub_or_of_a_folder_is_taken_by_name(tmp_path):
    _write_jsonl(tmp_path / "train.jsonl", [{"text": "w0"}, {"text": "w1"}])
    _write_jsonl(tmp_path / "test.jsonl", [{"text": "never trained on"}])
    assert load_documents(f"hf:{tmp_path}")["text"] == ["w0", "w1"]


def test_wrong_column_error_lists_the_columns(tmp_path):
    file = _write_jsonl(tmp_path / "a.jsonl", [{"body": "x", "title": "y"}])
    with pytest.raises(ValueError, match=r"no column 'story'; it has: body, title\. Use --text-column"):
        load_documents(file, "story")
    with pytest.raises(ValueError, match="no 'text' or 'messages' column"):
        load_documents(file)


def test_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"no such data file: /nowhere/x\.jsonl"):
        load_documents("/nowhere/x.jsonl")


@pytest.mark.parametrize("source", ["notes.docx", "wikitex", "some_folder"])
def test_unknown_source_error_lists_the_sources(source):
    with pytest.raises(ValueError, match=rf"unknown data source '{source}'.*\.jsonl.*alpaca.*self"):
        load_documents(source)


def test_binary_text_file_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 text"):
        load_documents(str(tmp_path / "a.txt"))


def test_damaged_jsonl_is_named(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "w0"}\n{"text": \n')
    with pytest.raises(ValueError, match=r"a\.jsonl cannot be read as jsonl"):
        load_documents(str(file))


def test_empty_jsonl_is_named(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text("")
    with pytest.raises(ValueError, match=r"a\.jsonl holds no rows with text"):
        load_documents(str(file))


# ------------------------------------------------------------------------------------------ chats
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role not in ('system', 'user', 'assistant') %}"
    "{{ raise_exception('role ' ~ m.role) }}{% endif %}[{{ m.role }}] {{ m.content }}{{ eos_token }}\n{% endfor %}"
)
CHAT = "[user] w0</s>\n[assistant] w1"


def _chat_tokenizer(**options):
    tokenizer = word_tokenizer(**options)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


OPENAI = [{"role": "user", "content": "w0"}, {"role": "assistant", "content": "w1"}]
SHAREGPT = [{"from": "human", "value": "w0"}, {"from": "gpt", "value": "w1"}]


@pytest.mark.parametrize("row", [{"messages": OPENAI}, {"conversations": SHAREGPT}, {"conversations": OPENAI}])
def test_chats_are_written_with_the_chat_template(row, tmp_path):
    """Without the BOS and EOS at the ends, which packing adds."""
    file = _write_jsonl(tmp_path / "a.jsonl", [row])
    assert load_documents(file, tokenizer=_chat_tokenizer())["text"] == [CHAT]
    assert load_documents(file, tokenizer=_chat_tokenizer(adds_bos=False))["text"] == ["<s>" + CHAT]
    assert load_documents(file, next(iter(row)), _chat_tokenizer())["text"] == [CHAT]


def test_chats_of_parquet_are_read(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"messages": [OPENAI, OPENAI]}).to_parquet(tmp_path / "a.parquet")
    assert load_documents(str(tmp_path / "a.parquet"), tokenizer=_chat_tokenizer())["text"] == [CHAT] * 2


def test_another_template_is_not_read_from_the_cache(tmp_path):
    file = _write_jsonl(tmp_path / "a.jsonl", [{"messages": OPENAI}])
    load_documents(file, tokenizer=_chat_tokenizer())
    other = _chat_tokenizer()
    other.chat_template = "{{ messages[0].content }}"
    assert load_documents(file, tokenizer=other)["text"] == ["w0"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "narrator", "content": "w"}]}, "line 1: the chat template refuses the row: .*narrator"),
        ({"messages": [{"text": "w0"}]}, "line 1: a message is an object; wanted one with role and content"),
        ({"messages": ["w0", "w1"]}, "line 1: column 'messages' holds a list of 2; text is wanted"),
    ],
)
def test_chat_that_cannot_be_written_is_named(row, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_documents(_write_jsonl(tmp_path / "a.jsonl", [row]), tokenizer=_chat_tokenizer())


def test_chats_need_a_chat_template(tmp_path):
    file = _write_jsonl(tmp_path / "a.jsonl", [{"messages": OPENAI}])
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: the row is a chat and the tokenizer .* no chat template"):
        load_documents(file, tokenizer=word_tokenizer())


# ------------------------------------------------------------------------------------------ odd rows
@pytest.mark.parametrize(
    ("value", "kind"),
    [(5, "a number"), (True, "a boolean"), (["w0", "w1"], "a list of 2"), ([], "a list of 0"), ({"a": 1}, "an object")],
)
@pytest.mark.parametrize("first", [0, 3])
def test_row_that_is_not_text_is_named(value, kind, first, tmp_path):
    """Lists of two texts were taken as pairs of sentences, and other types failed without file or row."""
    file = _write_jsonl(tmp_path / "a.jsonl", [{"text": "w0"}] * first + [{"text": value}])
    with pytest.raises(ValueError, match=rf"a\.jsonl, line {first + 1}: column 'text' holds {kind}; text is wanted"):
        load_documents(file)


def test_instruction_that_is_not_text_is_named(tmp_path):
    file = _write_jsonl(tmp_path / "a.jsonl", [{"instruction": "a", "output": ["b"]}])
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: column 'output' holds a list of 1; text is wanted"):
        load_documents(file)


def test_bytes_in_parquet_are_named(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": [b"w0"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet, row 1: column 'text' holds bytes; text is wanted"):
        load_documents(str(tmp_path / "a.parquet"))


def test_rows_without_text_are_left_out(tmp_path):
    rows = [{"text": None}] * 1200 + [{"text": "w0"}, {"text": ""}, {"text": None, "more": 1}, {"text": "w1"}]
    assert load_documents(_write_jsonl(tmp_path / "a.jsonl", rows))["text"] == ["w0", "w1"]
    for nothing in ([{"text": None}] * 5, [{"text": ""}], []):
        with pytest.raises(ValueError, match=r"b\.jsonl holds no rows with text"):
            load_documents(_write_jsonl(tmp_path / "b.jsonl", nothing))


def test_lone_surrogate_becomes_the_replacement_character(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "w1 \\ud83d w2 \\ud83d\\ude42"}\n')
    assert load_documents(str(tmp_path / "a.jsonl"))["text"] == ["w1 \ufffd w2 🙂"]


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.json", '[{"text": "w0"}, {"text": "w1"}]', ["w0", "w1"]),
        ("a.json", '{"text": "w0"}\n\n{"text": "w1"}\n', ["w0", "w1"]),
        ("a.json", '["w0", "w1"]', ["w0", "w1"]),
        ("a.json", '[\n {\n  "text": "w0"\n }\n]', ["w0"]),
        ("A.JSONL", '{"text": "w0"}\r\n{"text": "w1"}', ["w0", "w1"]),
        ("A.TXT", "w0\r\nw1", ["w0\nw1"]),
    ],
)
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_layouts_of_json_and_byte_order_marks(name, content, texts, bom, tmp_path):
    (tmp_path / name).write_bytes((bom + content).encode())
    assert load_documents(str(tmp_path / name))["text"] == texts


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", "café".encode("latin-1"), r"a\.txt is not UTF-8 text"),
        (
            "a.jsonl",
            b'{"text": "w0"}\n' + '{"text": "café"}\n'.encode("latin-1"),
            r"a\.jsonl, line 2, is not UTF-8 text",
        ),
        ("a.json", '[{"text": "café"}]'.encode("latin-1"), r"a\.json is not UTF-8 text"),
        ("a.txt", "w0".encode("utf-16"), r"a\.txt is not UTF-8 text"),
        ("a.json", b'{"data": [{"text": "w0"}]}', r"a\.json, row 1: it has no 'text' .*; it has: data"),
        ("a.jsonl", b'"w0"\n5\n', r"a\.jsonl, line 2: it holds a number; wanted an object"),
        ("a.parquet", b"PAR1", r"a\.parquet cannot be read as parquet"),
    ],
)
def test_file_that_cannot_be_read_is_named(name, data, message, tmp_path):
    (tmp_path / name).write_bytes(data)
    for read in (load_documents, lambda source: check_source(source, None, None)):
        with pytest.raises(ValueError, match=message):
            read(str(tmp_path / name))


def test_changed_file_is_read_anew(tmp_path):
    assert load_documents(_write_jsonl(tmp_path / "a.jsonl", [{"text": "w0"}]))["text"] == ["w0"]
    assert load_documents(_write_jsonl(tmp_path / "a.jsonl", [{"text": "w1 w2"}]))["text"] == ["w1 w2"]


def test_dry_run_refuses_data_that_the_run_would_refuse(config, run_cli, tmp_path):
    file = _write_jsonl(tmp_path / "a.jsonl", [{"text": 5}])
    for source, message in ((file, "line 1: column 'text' holds a number"), ("/nowhere.txt", "no such data file")):
        code, _, error = run_cli(
            "train", "--base", config().base, "--data", source, "--dry-run", "--out", tmp_path / "out"
        )
        assert code == 2
        assert message in error
