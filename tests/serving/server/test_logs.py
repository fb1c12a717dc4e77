import json
import logging

import pytest
from tomoe_serving.server.logs import configure_logging

NAMES = ("", "tomoe_serving", "uvicorn.error", "httpx")


@pytest.fixture(autouse=True)
def restored_loggers():
    loggers = [logging.getLogger(name) for name in NAMES]
    before = [(logger, list(logger.handlers), logger.level, logger.propagate) for logger in loggers]
    yield
    for logger, handlers, level, propagate in before:
        logger.handlers[:], logger.propagate = handlers, propagate
        logger.setLevel(level)


def test_a_line_is_a_json_object_with_the_extra_fields(capsys):
    configure_logging("json", "info")
    logging.getLogger("tomoe_serving.access").info("GET %s", "/x\ny", extra={"status": 200})
    (line,) = capsys.readouterr().err.splitlines()
    entry = json.loads(line)
    assert (entry["level"], entry["logger"], entry["message"], entry["status"]) == (
        "INFO", "tomoe_serving.access", "GET /x\ny", 200,
    )  # fmt: skip


def test_logger_of_the_package_survives_a_change_of_the_root(capsys):
    configure_logging("json", "info")
    logging.getLogger().handlers[:] = []
    logging.getLogger().setLevel("ERROR")
    logging.getLogger("tomoe_serving").info("still here")
    assert capsys.readouterr().err.count("still here") == 1


def test_level_and_text(capsys):
    configure_logging("text", "warning")
    logging.getLogger("tomoe_serving").info("quiet")
    logging.getLogger("tomoe_serving").warning("loud")
    err = capsys.readouterr().err
    assert "quiet" not in err
    assert "WARNING tomoe_serving loud" in err
