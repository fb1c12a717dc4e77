"""Names of vLLM's API server and of its engine client.

The server's modules moved in vLLM 0.33. A branch for an old release goes when that release is no longer supported.
"""

import dataclasses

from vllm.config.logging import LoggingConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.logger import configure_logging_from_args
from vllm.outputs import RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.loggers import StatLoggerBase

try:  # vLLM 0.33
    from vllm.entrypoints.common.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.common.startup import cli_env_setup
except ModuleNotFoundError:  # vLLM 0.31 and 0.32
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup

__all__ = [
    "AsyncEngineArgs",
    "AsyncLLM",
    "FlexibleArgumentParser",
    "GracefulHTTPError",
    "RequestOutput",
    "RequestOutputKind",
    "StatLoggerBase",
    "UsageContext",
    "VLLMValidationError",
    "build_app",
    "cli_env_setup",
    "configure_logging_from_args",
    "init_app_state",
    "log_format_flags",
    "make_arg_parser",
    "validate_parsed_serve_args",
]


def log_format_flags(log_format: str) -> list[str]:
    """Command-line flags that make vLLM write ``json`` or ``text`` log lines; vLLM 0.31 always writes text."""
    has_formatter = any(field.name == "formatter" for field in dataclasses.fields(LoggingConfig))
    return ["--logging-config.formatter", log_format] if has_formatter else []
