"""Settings of ``tomoe serve``, from a file, ``TOMOE_*`` environment variables, flags and ``--set``.

API keys are kept as SHA-256 only: a plain key given by flag or environment is hashed at once, a file must hold
the hash.
"""

import hashlib
import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from tomoe_serving.server.tls import require_certificate
from tomoe_vllm.settings import Settings, read_assignments, read_environment, read_file, resolve

PREFIX = "TOMOE_"
OTHER_VARIABLES = {"TOMOE_CACHE_ROOT", "TOMOE_TUNED_CONFIG_FOLDER", "TOMOE_TRACEBACK", "TOMOE_CONFIG"}
"""``TOMOE_*`` that are not settings of the server."""

SERVICE_LINK = re.compile(r"TOMOE_(SERVICE_(HOST|PORT)|PORT_\d+_(TCP|UDP)).*")
"""Variables that Kubernetes sets in every pod of a namespace with a Service called ``tomoe``."""

OWN_FLAGS = {
    *("--model", "--host", "--port", "--uds", "--api-key", "--allowed-origins", "--shutdown-timeout"),
    *("--ssl-keyfile", "--ssl-certfile", "--ssl-ca-certs", "--ssl-cert-reqs", "--ssl-ciphers"),
}
"""Flags of vLLM for what this server does itself: refused after ``--``."""

_HASH = re.compile(r"sha256:[0-9a-f]{64}")


class ServerSettings(Settings):
    """Settings of the server. Times are in seconds unless the name has another unit."""

    checkpoint: Path
    """Folder of the ToMoE checkpoint."""
    host: str = "127.0.0.1"
    """Address to bind; 0.0.0.0 opens the server to the network."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to bind; 0 takes a free one."""
    tls_cert: Path | None = None
    """PEM file of the TLS certificate (chain)."""
    tls_key: Path | None = None
    """PEM file of the certificate's private key."""
    api_keys: list[str] = Field(default=[], repr=False)
    """API keys that clients may use, separated by commas; plain (hashed at once) or sha256:HEX."""
    allowed_origins: list[str] = []
    """Web origins that may call the API from a browser (CORS), separated by commas; none by default."""
    max_body_bytes: int = Field(default=16 << 20, gt=0)
    """Largest request body; larger ones are refused with 413."""
    header_timeout: float = Field(default=10.0, gt=0)
    """Timeout for receiving a request's headers."""
    body_timeout: float = Field(default=30.0, gt=0)
    """Timeout for receiving a request's body."""
    keep_alive_timeout: int = Field(default=75, gt=0)
    """Idle keep-alive timeout; must exceed the load balancer's, or it may reuse a closed connection."""
    drain_timeout: float = Field(default=30.0, ge=0)
    """Time that running requests have to finish after SIGTERM."""
    queue_size: int = Field(default=256, ge=0)
    """Sequences that may wait for a slot; further requests are refused with 429."""
    tpot_slo_ms: float | None = Field(default=None, gt=0)
    """Target time per output token, in milliseconds; requests that would exceed it wait in the queue."""
    measure: bool = True
    """Measure the step time at start-up if no profile holds it."""
    profile: Path | None = None
    """JSON file of measured step times: read if it exists, else measured and written."""
    report_active_parameters: bool = False
    """Add active_parameters_per_token to every `usage`; clients can request it with the X-ToMoE-Usage header."""
    expert_statistics: bool = True
    """Count the tokens of each expert, for /metrics and the playground; costs under 1 % of a step."""
    log_format: Literal["json", "text"] = "json"
    """json (one object per line) or text."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Lowest severity that is logged."""
    log_prompts: bool = False
    """Log request bodies, including prompts."""
    engine_args: list[str] = []
    """Flags for vLLM's engine, separated by spaces; on the command line, give them after --."""

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
                raise ValueError(f"{flag} is not a flag for vLLM here: give the flag of tomoe serve before the --")
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


def load_settings(
    flags: Mapping[str, Any],
    assignments: Iterable[str] = (),
    file: Path | None = None,
    environment: Mapping[str, str] = os.environ,
) -> ServerSettings:
    """Resolve the settings: defaults, then the file, the environment, flags and ``key=value`` assignments.

    Without ``file``, TOMOE_CONFIG names it. Raises ``ValueError`` in one line.
    """
    if file is None and environment.get("TOMOE_CONFIG"):
        file = Path(environment["TOMOE_CONFIG"])
    from_file = read_file(ServerSettings, file)
    keys = from_file.get("api_keys") or []
    listed = keys if isinstance(keys, list) else str(keys).split(",")
    if any(not _HASH.fullmatch(str(key).strip()) for key in listed):
        raise ValueError(
            f"{file}: api_keys must be hashes, sha256:HEX (printf %s KEY | sha256sum); "
            "plain keys go into TOMOE_API_KEYS"
        )
    links = {name for name in environment if SERVICE_LINK.fullmatch(name)}
    if environment.get("TOMOE_PORT", "").startswith("tcp://"):
        print("tomoe serve: TOMOE_PORT is a Kubernetes service link and is ignored", file=sys.stderr)
        links.add("TOMOE_PORT")
    from_environment = read_environment(ServerSettings, environment, PREFIX, OTHER_VARIABLES | links)
    return resolve(ServerSettings, from_file, from_environment, flags, read_assignments(assignments))
