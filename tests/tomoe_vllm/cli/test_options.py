"""Commands whose options are the fields of a settings model."""

import re
from pathlib import Path

import pytest

from tomoe_vllm.cli.options import repeat_option

COMMANDS = {
    "train": ("train", "--out", "x", "--base", "/nowhere"),
    "finetune": ("finetune", "--out", "x", "--model", "/nowhere"),
    "compare": ("eval", "compare", "--text", "/nowhere", "--base", "/nowhere"),
}


@pytest.mark.parametrize(
    ("words", "repeated"),
    [
        ("--data a b --steps 3", "--data a --data b --steps 3"),
        ("--data=a b c", "--data=a --data b --data c"),
        ("--data a --seed 1 --data b c", "--data a --seed 1 --data b --data c"),
        ("--steps 3 stray --data a", "--steps 3 stray --data a"),
        ("stray", "stray"),
        ("--data", "--data"),
        ("", ""),
    ],
)
def test_words_after_an_option_repeat_it(words, repeated):
    assert repeat_option("--data", words.split()) == repeated.split()


@pytest.fixture
def data_of(run_cli, monkeypatch):
    """``data_of(*arguments)``: the settings that a command resolves."""
    import tomoe_training.config

    found = []
    resolve = tomoe_training.config.resolve

    def record(*arguments):
        found.append(resolve(*arguments))
        return found[-1]

    monkeypatch.setattr(tomoe_training.config, "resolve", record)

    def run(*arguments):
        run_cli(*arguments)
        return found[-1]

    return run


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_data_takes_several_words(command, data_of):
    settings = data_of(*command, "--data", "a", "b", "--steps", 3)
    assert (settings.data, settings.steps) == (["a", "b"], 3)


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize(
    "words", [("--steps", 3, "stray"), ("stray", "--data", "a", "b"), ("--data", "a", "--", "stray")]
)
def test_stray_word_is_refused_by_name(command, words, run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = run_cli(*command, *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "stray" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_flags_are_typed_and_set_overrides_them(command, data_of):
    assert data_of(*command, "--steps", 3, "--set", "steps=4").steps == 4


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--steps", "many"), "'--steps': Input should be a valid integer"),
        (("--stepz", "3"), "No such option: --stepz"),
        (("--set", "stepz=3"), "unknown setting 'stepz'; did you mean 'steps'?"),
        (("--config", "/nowhere.yaml"), "no such configuration file: /nowhere.yaml"),
        (("--data",), "'--data' requires an argument"),
    ],
)
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_misuse_is_one_line(command, words, expected, run_cli):
    code, out, err = run_cli(*command, *words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert expected in err


def test_file_holds_settings_of_fine_tuning(data_of, tmp_path):
    (tmp_path / "run.toml").write_text("rank = 3\nsteps = 7\n")
    settings = data_of(*COMMANDS["finetune"], "--config", tmp_path / "run.toml", "--steps", 8)
    assert (settings.rank, settings.steps) == (3, 8)


@pytest.mark.parametrize("command", ["train", "finetune"])
def test_help_lists_every_setting_with_its_default(command, run_cli):
    import tomoe_training.config as config

    model = {"train": config.RunConfig, "finetune": config.FinetuneConfig}[command]
    code, out, _ = run_cli(command, "--help")
    assert code == 0
    for name in model.model_fields.keys() - {"architecture", "notes"}:
        assert f"--{name.replace('_', '-')} " in out
    assert "[default: 512]" in " ".join(out.split())
    assert "--architecture" not in out


def test_errors_in_the_documentation_are_what_the_commands_print(run_cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[3] / "docs" / "configuration.md").read_text()
    examples = re.findall(r"^\$ (?:(\w+)=(\w+) )?tomoe (.+)\n(tomoe: .+\n)", page, re.MULTILINE)
    assert len(examples) == 4
    for variable, value, arguments, line in examples:
        with monkeypatch.context() as context:
            if variable:
                context.setenv(variable, value)
            assert run_cli(*arguments.split()) == (2, "", line)
