"""The report's files are whole at every moment, and its folder is new."""

import json

import pytest

from tomoe_vllm.diagnostics.full import report as report_module
from tomoe_vllm.diagnostics.full.report import DONE, FAILED, NOT_RUN, PASSED, Report, Result, make_folder

ENVIRONMENT = {"tomoe_vllm": "0.1.0", "torch": "2.11.0", "triton": None, "transformers": None, "vllm": None}


@pytest.fixture
def report(tmp_path):
    make_folder(tmp_path / "report")
    return Report(
        folder=tmp_path / "report", command="tomoe doctor --full", environment=ENVIRONMENT, is_interpreted=False,
        limit_s=480,
    )  # fmt: skip


def result(name, status, reason=None):
    return Result(part="kernels", name=name, status=status, reason=reason)


def test_summary_counts_what_was_checked(report):
    assert report.summary() == "0 checks, 0 failed"
    report.results = [result("a", PASSED), result("b", FAILED, "wrong"), result("c", NOT_RUN, "out of time")]
    report.results.append(result("rates of the device", DONE))
    assert report.summary() == "2 checks, 1 failed, 1 not run"


def test_both_files_hold_the_results_so_far(report):
    report.results = [result("gather, 3 tokens", FAILED, "relative error 1")]
    report.write()
    facts = json.loads((report.folder / "report.json").read_text())
    assert facts["results"][0] == {
        "part": "kernels", "name": "gather, 3 tokens", "status": "failed", "reason": "relative error 1", "values": {},
    }  # fmt: skip
    assert (facts["is_complete"], facts["summary"]) == (False, "1 checks, 1 failed")
    page = (report.folder / "report.md").read_text()
    assert "- gather, 3 tokens: relative error 1" in page
    assert "The run has not ended" in page


def test_numbers_that_json_does_not_have_are_text(report):
    values = {"cpu": {"losses": [float("nan"), 2.0], "perplexity": float("inf")}}
    report.results = [Result(part="training", name="a", status=FAILED, reason="x", values=values)]
    report.write()

    def refuse(name):
        raise ValueError(name)

    facts = json.loads((report.folder / "report.json").read_text(), parse_constant=refuse)
    assert facts["results"][0]["values"]["cpu"] == {"losses": ["nan", 2.0], "perplexity": "inf"}


def test_an_interrupted_write_keeps_the_old_files(report, monkeypatch):
    report.write()
    before = {file.name: file.read_text() for file in report.folder.glob("report.*")}

    def full(self, text):
        raise OSError(28, "No space left on device")

    report.results = [result("a", PASSED)]
    monkeypatch.setattr(report_module.Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        report.write()
    assert {file.name: file.read_text() for file in report.folder.glob("report.*")} == before


def test_the_folder_must_be_new(tmp_path):
    (tmp_path / "file").write_text("")
    for name in (".", "file"):
        with pytest.raises(ValueError, match="already exists; use a new folder"):
            make_folder(tmp_path / name)


def test_a_folder_below_a_file_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written: Not a directory"):
        make_folder(tmp_path / "file" / "report")
