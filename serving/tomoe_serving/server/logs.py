"""One JSON object per line on standard error, for the server, uvicorn and vLLM alike."""

import logging
import sys

from pythonjsonlogger.json import JsonFormatter

FIELDS = "%(asctime)s %(levelname)s %(name)s %(message)s"


def configure_logging(log_format: str, level: str) -> None:
    """Set the process's root logger and ours. ``log_format`` is ``json`` or ``text``.

    Ours does without the root's handler: a library that vLLM imports with its app takes that over.
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
    # uvicorn's own lines repeat ours (start, stop) or come from us (access).
    logging.getLogger("uvicorn.error").setLevel("WARNING")
    logging.getLogger("httpx").setLevel("WARNING")
