"""What lies beside every output."""

import json
import sys
from importlib.metadata import version

from tomoe_training.artifacts.provenance import provenance

from tomoe_vllm import __version__


def test_record_names_versions_and_the_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/home/someone/.venv/bin/tomoe", "export", "--out", "x"])
    record = json.loads(json.dumps(provenance()))
    assert record["versions"]["tomoe-vllm"] == __version__
    assert record["versions"]["torch"] == version("torch")
    assert record["command"] == ["tomoe", "export", "--out", "x"]
    assert "someone" not in json.dumps(record)
