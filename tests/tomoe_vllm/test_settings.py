"""The loader of settings: order of precedence, files, environment, and one-line errors."""

import ast
import os
import sys
from pathlib import Path

import pytest
from pydantic import Field

import tomoe_vllm.settings
from tomoe_vllm.settings import Settings, check_name, read_assignments, read_environment, read_file, resolve


class Kettle(Settings):
    """Settings of a test."""

    liquid: str
    """What to boil."""
    degrees: float = Field(default=100.0, le=100)
    """Target temperature in degrees Celsius."""
    code: str = Field(default="", repr=False, max_length=2)
    """Secret."""
    log: Path | None = None
    """File of the log."""


def error_of(function, *arguments) -> str:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 (the message is returned)
        function(*arguments)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_later_sources_win():
    kettle = resolve(Kettle, {"liquid": "tea", "degrees": 1}, {"degrees": 2}, {})
    assert (kettle.liquid, kettle.degrees, kettle.code) == ("tea", 2.0, "")


def test_errors_name_the_setting_what_was_given_and_what_is_allowed():
    assert error_of(resolve, Kettle, {}) == "liquid is missing: What to boil."
    assert error_of(resolve, Kettle, {"liquid": "tea", "degrees": 101}) == "degrees is 101; it must be at most 100"
    assert error_of(resolve, Kettle, {"liquid": "tea", "log": 3}) == "log is 3; it must be a valid path"
    assert error_of(resolve, Kettle, {"liqid": "tea"}) == "unknown setting 'liqid'; did you mean 'liquid'?"
    assert error_of(resolve, Kettle, {"liquid": "tea", "degrees": "hot", "code": 3}).count("must be") == 2


def test_secret_values_are_not_shown():
    message = error_of(resolve, Kettle, {"liquid": "tea", "code": "hunter2"})
    assert message == "code must have at most 2 characters"


@pytest.mark.parametrize(
    ("name", "text"), [("a.yaml", "liquid: tea\ndegrees: 3\n"), ("a.toml", 'liquid="tea"\ndegrees=3')]
)
def test_files_are_yaml_or_toml(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    assert read_file(Kettle, tmp_path / name) == {"liquid": "tea", "degrees": 3}


def test_a_pipe_is_read_like_a_file():
    reader, writer = os.pipe()
    os.write(writer, b"liquid: tea")
    os.close(writer)
    assert read_file(Kettle, Path(f"/dev/fd/{reader}")) == {"liquid": "tea"}
    os.close(reader)


def test_no_file_and_an_empty_file_hold_no_settings(tmp_path):
    (tmp_path / "a.yaml").write_text("")
    assert read_file(Kettle, None) == read_file(Kettle, tmp_path / "a.yaml") == {}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "degres: 1", "a.yaml: unknown setting 'degres'; did you mean 'degrees'?"),
        ("a.yaml", "- 1", "a.yaml must hold names and values, not a list"),
        ("a.yaml", "a: [", "a.yaml is not valid YAML"),
        ("a.toml", "a: [", "a.toml is not valid TOML"),
    ],
)
def test_a_wrong_file_is_named(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    assert message in error_of(read_file, Kettle, tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such configuration file: /nowhere"):
        read_file(Kettle, Path("/nowhere"))


def test_environment_variables_have_a_prefix():
    environment = {"KETTLE_DEGREES": "3", "KETTLE_LID": "on", "HOME": "/"}
    assert read_environment(Kettle, environment, "KETTLE_", {"KETTLE_LID"}) == {"degrees": "3"}
    message = error_of(read_environment, Kettle, {"KETTLE_DEGREE": "3"}, "KETTLE_")
    assert message == "unknown environment variable 'KETTLE_DEGREE'; did you mean 'KETTLE_DEGREES'?"


def test_assignments_hold_yaml():
    found = read_assignments(["a=1e-3", "b=[x, y]", "c=", "d=x=y", "e = no"])
    assert found == {"a": 1e-3, "b": ["x", "y"], "c": None, "d": "x=y", "e": False}
    assert error_of(read_assignments, ["a"]) == "--set takes key=value, got 'a'"
    assert error_of(read_assignments, ["a={"]) == "--set a: '{' is not valid YAML"


def test_all_names_are_listed_if_none_is_near():
    assert error_of(check_name, "zzz", ["port", "host"]) == "unknown setting 'zzz'; known: port, host"


def test_the_loader_imports_little():
    tree = ast.parse(Path(tomoe_vllm.settings.__file__).read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in names} - sys.stdlib_module_names == {"pydantic", "yaml"}
