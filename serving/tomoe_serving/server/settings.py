"""Settings of ``tomoe serve``: flags over environment (``TOMOE_*``) over file (``--config``, YAML or TOML).

Unknown names are refused everywhere, with the nearest known one. API keys are kept as SHA-256 only: a plain
key given by flag or environment is hashed at once, a file must hold the hash.
"""

import difflib
import hashlib
import os
import re
import sys
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, CliPositionalArg, CliSettingsSource, NoDecode, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError

from tomoe_serving.server.tls import require_certificate

PREFIX = "TOMOE_"
OTHER_VARIABLES = {"TOMOE_CACHE_ROOT", "TOMOE_TUNED_CONFIG_FOLDER", "TOMOE_TRACEBACK", "TOMOE_CONFIG"}
"""``TOMOE_*`` that are not settings of the server."""

SERVICE_LINK = re.compile(r"TOMOE_(SERVICE_(HOST|PORT)|PORT_\d+_(TCP|UDP)).*")
"""What Kubernetes puts into every pod beside a Service called ``tomoe`` (and ``TOMOE_PORT=tcp://...``)."""

OWN_FLAGS = {
    *("--model", "--host", "--port", "--uds", "--api-key", "--allowed-origins", "--shutdown-timeout"),
    *("--ssl-keyfile", "--ssl-certfile", "--ssl-ca-certs", "--ssl-cert-reqs", "--ssl-ciphers"),
}
"""vLLM's flags that the server answers for: given after ``--`` they are refused."""

_HASH = re.compile(r"sha256:[0-9a-f]{64}")


class ServerSettings(BaseSettings):
    """Everything an operator can set. Times in seconds unless the name says otherwise."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, cli_kebab_case=True, cli_implicit_flags=True,
        cli_hide_none_type=True,
    )  # fmt: skip

    checkpoint: CliPositionalArg[Path]
    """Folder of the ToMoE checkpoint."""
    host: str = "127.0.0.1"
    """Address to bind; 0.0.0.0 opens the server to the network."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to bind; 0 takes a free one."""
    tls_cert: Path | None = None
    """PEM file of the certificate (chain)."""
    tls_key: Path | None = None
    """PEM file of the certificate's private key."""
    api_keys: Annotated[list[str], NoDecode] = Field(default=[], repr=False)
    """Keys that clients may use, separated by commas; plain (hashed at once) or sha256:HEX."""
    allowed_origins: Annotated[list[str], NoDecode] = []
    """Web origins that may call the API from a browser (CORS), separated by commas; none by default."""
    max_body_bytes: PositiveInt = 16 << 20
    """Largest request body; larger ones get 413."""
    header_timeout: PositiveFloat = 10.0
    """Time a client has to send a request's headers."""
    body_timeout: PositiveFloat = 30.0
    """Time a client has to send a request's body."""
    keep_alive_timeout: PositiveInt = 75
    """Time an idle connection stays open: longer than clients and balancers keep it, who would meet a closed one."""
    drain_timeout: float = Field(default=30.0, ge=0)
    """Time that running requests have after SIGTERM before they are cut."""
    queue_size: int = Field(default=256, ge=0)
    """Sequences that may wait for a seat; beyond that requests get 429."""
    tpot_slo_ms: PositiveFloat | None = None
    """Time per output token to keep, in milliseconds; requests that would break it wait."""
    measure: bool = True
    """Measure the step time at start-up where no profile holds it."""
    profile: Path | None = None
    """JSON file of the measured step time: read if it exists, else measured and written."""
    report_active_parameters: bool = False
    """Add active_parameters_per_token to every `usage`; a client can ask for it with the X-ToMoE-Usage header."""
    expert_statistics: bool = True
    """Count which expert serves which token, for /metrics and the page; under 1 % of a step."""
    log_format: Literal["json", "text"] = "json"
    """One JSON object a line, or plain text."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe messages to log."""
    log_prompts: bool = False
    """Write request bodies, prompts included, to the log."""
    engine_args: Annotated[list[str], NoDecode] = []
    """Flags for vLLM's engine; on the command line give them after --."""

    @classmethod
    def settings_customise_sources(cls, settings_cls, init_settings, *others, **more):
        """Only what :func:`load_settings` hands over: it reads the environment, to refuse unknown names there."""
        return (init_settings,)

    @field_validator("api_keys", "allowed_origins", mode="before")
    @classmethod
    def _split_commas(cls, value: object) -> object:
        parts = [value] if isinstance(value, str) else value
        if not isinstance(parts, list | tuple):
            return value
        return [item.strip() for part in parts for item in str(part).split(",") if item.strip()]

    @field_validator("engine_args", mode="before")
    @classmethod
    def _split_words(cls, value: object) -> object:
        if isinstance(value, list):
            return [str(item) for item in value]
        return value.split() if isinstance(value, str) else value

    @field_validator("api_keys")
    @classmethod
    def _hash_keys(cls, keys: list[str]) -> list[str]:
        return [key if _HASH.fullmatch(key) else hash_key(key) for key in keys]

    @field_validator("engine_args")
    @classmethod
    def _refuse_own_flags(cls, flags: list[str]) -> list[str]:
        for flag in flags:
            if flag.partition("=")[0].replace("_", "-") in OWN_FLAGS:
                raise ValueError(f"{flag} is not for vLLM here: give tomoe serve its own flag before the --")
        return flags

    @model_validator(mode="after")
    def _check_tls(self) -> "ServerSettings":
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("TLS needs both --tls-cert and --tls-key")
        if self.tls_cert is not None and self.tls_key is not None:
            require_certificate(self.tls_cert, self.tls_key)
        return self


def hash_key(key: str) -> str:
    """``sha256:`` and 64 hex digits. API keys are long and random, so a plain hash is enough."""
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def nearest(name: str, known: Iterable[str]) -> str:
    """ " (did you mean X?)" or nothing."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {found[0]}?)" if found else ""


def load_settings(arguments: list[str], environment: Mapping[str, str] = os.environ) -> ServerSettings:
    """Settings from the command line (what follows ``tomoe serve``), the environment and a file.

    Raises ``ValueError`` in one line; ``SystemExit`` after printing the help for ``--help``.
    """
    own, engine_args = _split(arguments, "--")
    config, own = _take_config(own, environment.get("TOMOE_CONFIG"))
    _refuse_unknown_flags(own)
    values = _from_file(config) | _from_environment(environment)
    if engine_args:
        values["engine_args"] = engine_args
    try:
        return _resolve(own, values)
    except ValidationError as error:
        raise ValueError("; ".join(map(_one_line, error.errors()))) from None
    except SettingsError as error:
        raise ValueError(str(error).removeprefix("error parsing CLI: ")) from None


def _resolve(own: list[str], values: dict[str, Any]) -> ServerSettings:
    """Flags over ``values``; the environment was read by :func:`_from_environment`, which refuses what it must."""

    flags: CliSettingsSource = CliSettingsSource(ServerSettings, cli_prog_name="tomoe serve", cli_exit_on_error=False)
    given = flags(args=own)() if own else {}
    return ServerSettings(**(values | given))


def _split(items: list[str], separator: str) -> tuple[list[str], list[str]]:
    if separator not in items:
        return items, []
    at = items.index(separator)
    return items[:at], items[at + 1 :]


def _take_config(own: list[str], default: str | None) -> tuple[Path | None, list[str]]:
    rest, config, words = [], default, iter(own)
    for word in words:
        if word == "--config":
            config = next(words, None)
            if config is None:
                raise ValueError("--config needs a file")
        elif word.startswith("--config="):
            config = word.partition("=")[2]
        else:
            rest.append(word)
    return Path(config) if config else None, rest


def _flags() -> list[str]:
    names = ["--" + name.replace("_", "-") for name in ServerSettings.model_fields if name != "checkpoint"]
    return [*names, *(f"--no-{name[2:]}" for name in names), "--help", "--config"]


def _refuse_unknown_flags(own: list[str]) -> None:
    for word in own:
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag not in _flags():
            raise ValueError(f"unknown flag {flag}{nearest(flag, _flags())}; flags for vLLM go after --")


def _from_environment(environment: Mapping[str, str]) -> dict[str, str]:
    known = {PREFIX + name.upper(): name for name in ServerSettings.model_fields}
    values = {}
    for variable, value in environment.items():
        if not variable.startswith(PREFIX) or variable in OTHER_VARIABLES or SERVICE_LINK.fullmatch(variable):
            continue
        if variable not in known:
            raise ValueError(f"unknown environment variable {variable}{nearest(variable, known)}")
        if variable == "TOMOE_PORT" and value.startswith("tcp://"):
            print("tomoe serve: TOMOE_PORT is a Kubernetes service link, ignored", file=sys.stderr)
            continue
        values[known[variable]] = value
    return values


def _from_file(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        text = file.read_text()
        data = tomllib.loads(text) if file.suffix == ".toml" else yaml.safe_load(text)
    except OSError as error:
        raise ValueError(f"--config {file} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {file} is not valid: {' '.join(str(error).split())}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ValueError(f"--config {file} must hold names and values, not a {type(data).__name__}")
    values = {str(key).replace("-", "_"): value for key, value in data.items()}
    for name in values:
        if name not in ServerSettings.model_fields:
            raise ValueError(f"--config {file}: unknown setting {name}{nearest(name, ServerSettings.model_fields)}")
    keys = values.get("api_keys") or []
    if any(not _HASH.fullmatch(key) for key in ([keys] if isinstance(keys, str) else map(str, keys))):
        raise ValueError(
            f"--config {file}: api_keys must be hashes, sha256:HEX (printf %s KEY | sha256sum); "
            "plain keys go into TOMOE_API_KEYS"
        )
    return values


def _one_line(error: Mapping[str, Any]) -> str:
    name = ".".join(map(str, error["loc"]))
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "missing":
        return "the checkpoint's folder is missing: tomoe serve CHECKPOINT"
    if not name:
        return message
    shown = f", got {error['input']!r}" if error["type"] != "value_error" and not name.startswith("api_keys") else ""
    return f"{name}: {message}{shown}"
