"""A run's settings: order of precedence, and one clear error for each misuse."""

import json
import typing
from pathlib import Path

import pytest
import yaml
from tomoe_training.config import FinetuneConfig, MethodSettings, RunConfig, load_run_config

from tomoe_vllm.hf.configuration_tomoe import VO_MODES
from tomoe_vllm.settings import resolve

ADAPTERS = sorted((Path(__file__).parents[2] / "adapters").glob("*/adapter_config.json"))


def test_defaults_are_those_of_the_paper_where_it_gives_them():
    config = load_run_config(None, {}, [])
    assert (config.num_experts, config.value_router_dim, config.tau) == (8, 128, 0.4)
    assert (config.learning_rate, config.weight_decay, config.steps) == (1e-3, 0.05, 10_000)
    assert (config.alpha, config.beta, config.gamma) == (16.0, 2.0, 1.0)


def test_set_goes_over_flags_and_flags_over_the_file(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("steps: 1\nseed: 1\nbatch_size: 1\ntau: 1\n")
    config = load_run_config(file, {"seed": 2, "batch_size": 2, "base": None}, ["batch_size=3"])
    assert (config.steps, config.seed, config.batch_size, config.tau, config.base) == (1, 2, 3, 1.0, "")


@pytest.mark.parametrize(
    ("assignment", "name", "value"),
    [
        ("learning_rate=1e-4", "learning_rate", 1e-4),  # YAML 1.1 reads it as a string
        ("learning_rate=3", "learning_rate", 3.0),
        ("data=[a.txt, b.txt]", "data", ["a.txt", "b.txt"]),
        ("tensorboard=false", "tensorboard", False),
        ("micro_batch_size=null", "micro_batch_size", None),
        ("text_column=body", "text_column", "body"),
        ("vo_mode=none", "vo_mode", "none"),
        ("base=/a=b", "base", "/a=b"),
    ],
)
def test_assignments_are_typed(assignment, name, value):
    assert getattr(load_run_config(None, {}, [assignment]), name) == value


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("stepz=3", "unknown setting 'stepz'; did you mean 'steps'?"),
        ("learning-rate=3", "unknown setting 'learning-rate'; did you mean 'learning_rate'?"),
        ("zzzzzz=3", "unknown setting 'zzzzzz'; known: active_ratio, "),
        ("steps", "--set takes key=value, got 'steps'"),
        ("steps=many", "steps is 'many'; it must be a valid integer"),
        ("steps=1.5", "steps is 1.5; it must be a valid integer"),
        ("steps=true", "steps is True; it must be a valid integer"),
        ("tensorboard=1", "tensorboard is 1; it must be a valid boolean"),
        ("data=a.txt", "data is 'a.txt'; it must be a valid list"),
        ("data=[1]", "data.0 is 1; it must be a valid string"),
        ("micro_batch_size=x", "micro_batch_size is 'x'; it must be a valid integer"),
        ("active_ratio=0", "active_ratio is 0; it must be greater than 0"),
        ("active_ratio=1.01", "active_ratio is 1.01; it must be at most 1"),
        ("active_ratio=.nan", "active_ratio is nan; it must be a finite number"),
        ("learning_rate=.inf", "learning_rate is inf; it must be a finite number"),
        ("vo_mode=fast", "vo_mode is 'fast'; it must be 'dynamic', 'static' or 'none'"),
        ("objective=mse", "objective is 'mse'; it must be 'kd' or 'lm'"),
        ("budget=loose", "budget is 'loose'; it must be 'exact' or 'penalty'"),
        ("schedule=step", "schedule is 'step'; it must be 'constant', 'linear' or 'cosine'"),
        ("dtype=float16", "dtype is 'float16'; it must be 'auto', 'float32' or 'bfloat16'"),
        ("num_experts=0", "num_experts is 0; it must be at least 1"),
        ("seed=-1", "seed is -1; it must be at least 0"),
        ("batch_size=-1", "batch_size is -1; it must be at least 1"),
        ("sequence_length=1", "sequence_length is 1; it must be at least 2"),
        ("widths_every=-1", "widths_every is -1; it must be at least 0"),
        ("tau=0", "tau is 0; it must be greater than 0"),
        ("value_router_dim=127", "value_router_dim is 127; it must be a multiple of 2"),
        ("notes={", "--set notes: '{' is not valid YAML"),
    ],
)
def test_misuse_is_one_clear_error(assignment, message):
    with pytest.raises(ValueError) as raised:  # noqa: PT011 (the message is compared below)
        load_run_config(None, {}, [assignment])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["- 1\n", "steps: [\n", "steps: 1\nstepz: 2\n"])
def test_bad_file_is_an_error(text, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"run\.yaml|stepz"):
        load_run_config(file, {}, [])


def test_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match="no such configuration file: "):
        load_run_config(Path("/nowhere.yaml"), {}, [])


def test_every_setting_survives_the_file_it_is_kept_in(tmp_path):
    config = RunConfig(base="b", data=["x.txt"], steps=3, notes={"hardware": "none"}, architecture={"a": 1})
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config.model_dump()))
    assert load_run_config(file, {}, []) == config


def test_every_setting_has_a_description():
    for model in (RunConfig, FinetuneConfig):
        assert [name for name, field in model.model_fields.items() if not field.description] == []


def test_modes_are_those_of_the_checkpoint_format():
    assert typing.get_args(MethodSettings.model_fields["vo_mode"].annotation) == VO_MODES


@pytest.mark.parametrize("file", ADAPTERS, ids=lambda file: file.parent.name)
def test_settings_in_shipped_adapters_still_load(file):
    stored = json.loads(file.read_text())["training"]["config"]
    assert resolve(RunConfig, stored).model_dump().items() >= stored.items()


def test_shipped_adapters_are_found():
    assert len(ADAPTERS) == 2


def test_settings_of_a_run_cannot_change():
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().steps = 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "qlora"}, "method is 'qlora'; it must be 'lora' or 'full'"),
        ({"rank": 0}, "rank is 0; it must be at least 1"),
        ({"alpha": 0}, "alpha is 0; it must be at least 1"),
        ({"rank": 0, "steps": 0}, "rank is 0; it must be at least 1; steps is 0; it must be at least 1"),
        ({"lerning_rate": 1}, "unknown setting 'lerning_rate'; did you mean 'learning_rate'?"),
    ],
)
def test_misuse_of_fine_tuning_is_one_clear_error(settings, message):
    with pytest.raises(ValueError) as raised:  # noqa: PT011 (the message is compared below)
        resolve(FinetuneConfig, settings)
    assert str(raised.value) == message
