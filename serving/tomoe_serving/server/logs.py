"""Logging of the server and uvicorn: one JSON object per line, or plain text, on standard error."""

import logging
import sys

from pythonjsonlogger.json import JsonFormatter

FIELDS = "%(asctime)s %(levelname)s %(name)s %(message)s"


def configure_logging(log_format: str, level: str) -> None:
    """Configure the root logger and that of this package. ``log_format`` is ``json`` or ``text``.

    The package's logger has its own handler, because a library that vLLM imports replaces the root's.
    """
    handler = logging.StreamHandler(sys.stderr)
    names = {"asctime": "time", "levelname": "level", "name": "logger"}
    formatter = JsonFormatter(FIELDS, rename_fields=names) if log_format == "json" else logging.Formatter(FIELDS)
    handler.setFormatter(formatter)
    for name in ("", "tomoe_serving"):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level.upper())
    logging.getLogger("tomoe_serving").propagate = False
    # uvicorn's lines about start and stop repeat ours.
    logging.getLogger("uvicorn.error").setLevel("WARNING")
    logging.getLogger("httpx").setLevel("WARNING")
