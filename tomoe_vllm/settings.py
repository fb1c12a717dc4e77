"""Settings of a command: one pydantic model, resolved from several sources.

A command reads its sources with the functions below and passes them to :func:`resolve`, weakest first::

    resolve(RunConfig, read_file(RunConfig, file), flags, read_assignments(["steps=3"]))

Every mistake is a ``ValueError`` of one line that names the setting, what was given and what is allowed.
docs/configuration.md lists the sources of each command.
"""

import difflib
import re
import tomllib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError


class Settings(BaseModel):
    """Base of all settings models. A docstring below a field is the field's description."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


Model = TypeVar("Model", bound=Settings)


def resolve(model: type[Model], *sources: Mapping[str, Any]) -> Model:
    """Validate the defaults of ``model`` overridden by ``sources``, of which later ones win.

    Raises ``ValueError`` in one line for unknown names and for values of a wrong type or range.
    """
    values = {name: value for source in sources for name, value in source.items()}
    for name in values:
        check_name(name, model.model_fields)
    try:
        return model(**values)
    except ValidationError as error:
        raise ValueError("; ".join(_message(model, details) for details in error.errors())) from None


def read_file(model: type[Settings], file: Path | None) -> dict[str, Any]:
    """Settings in a TOML file (by its suffix) or YAML file; names may be written with dashes. None has none."""
    if file is None:
        return {}
    if not file.exists() or file.is_dir():  # a pipe is fine: --config <(command)
        raise FileNotFoundError(f"no such configuration file: {file}")
    try:
        text = file.read_text()
        values = (tomllib.loads(text) if file.suffix == ".toml" else yaml.safe_load(text)) or {}
    except (tomllib.TOMLDecodeError, yaml.YAMLError, UnicodeDecodeError) as error:
        kind = "TOML" if file.suffix == ".toml" else "YAML"
        raise ValueError(f"{file} is not valid {kind}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold names and values, not a {type(values).__name__}")
    values = {str(name).replace("-", "_"): value for name, value in values.items()}
    for name in values:
        check_name(name, model.model_fields, f"{file}: unknown setting")
    return values


def read_environment(
    model: type[Settings], environment: Mapping[str, str], prefix: str, ignored: Collection[str] = ()
) -> dict[str, str]:
    """Settings in the variables whose name begins with ``prefix``, but for the ``ignored`` ones.

    Raises ``ValueError`` for any other variable of that prefix.
    """
    known = {prefix + name.upper(): name for name in model.model_fields}
    found = {name: value for name, value in environment.items() if name.startswith(prefix) and name not in ignored}
    for variable in found:
        check_name(variable, known, "unknown environment variable")
    return {known[variable]: value for variable, value in found.items()}


def read_assignments(assignments: Iterable[str]) -> dict[str, Any]:
    """Settings given as ``name=value``, with values in YAML."""
    values = {}
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        if not separator:
            raise ValueError(f"--set takes key=value, got {assignment!r}")
        try:
            values[name.strip()] = _number_or(yaml.safe_load(text))
        except yaml.YAMLError as error:
            raise ValueError(f"--set {name.strip()}: {text!r} is not valid YAML") from error
    return values


def check_name(name: str, known: Iterable[str], what: str = "unknown setting") -> None:
    """Raise ``ValueError`` with the nearest known name, or all of them, if ``name`` is not ``known``."""
    known = list(known)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
        raise ValueError(f"{what} {name!r}; {hint}")


def _number_or(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as a string."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _message(model: type[Settings], details: Any) -> str:
    """One of pydantic's error reports in one line, without the value of a field with ``repr=False``."""
    name, text = ".".join(map(str, details["loc"])), details["msg"].removeprefix("Value error, ")
    if details["type"] == "value_error":
        return f"{name}: {text}" if name else text
    field = model.model_fields[str(details["loc"][0])]
    if details["type"] == "missing":
        return f"{name} is missing: {field.description}"
    given = f"is {details['input']!r}; it must" if field.repr else "must"
    text = re.sub("^[A-Z][a-z]+ should |, unable to .*", "", text)
    text = re.sub("^[A-Z][a-z]+ is not a valid ([a-z]+).*", r"be a valid \1", text)
    text = text.replace("greater than or equal to", "at least").replace("less than or equal to", "at most")
    return f"{name} {given} {text}"
