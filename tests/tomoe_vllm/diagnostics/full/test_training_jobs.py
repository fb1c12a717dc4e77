"""The training smoke run: what it compares, and that it obeys a GPU's rules."""

import math

import pytest
import torch
from tomoe_training.evaluation import perplexity
from tomoe_training.evaluation.perplexity import negative_log_likelihoods

from tests.helpers.pretended_gpu import pretended_gpu
from tomoe_vllm.diagnostics.full import training_jobs
from tomoe_vllm.diagnostics.full.plan import Job, Options
from tomoe_vllm.diagnostics.full.report import NotRunError
from tomoe_vllm.diagnostics.full.training_jobs import STEPS, compare, run, smoke_run, write_base


def job(kind):
    return Job(part="training", name=kind, kind=kind, process=kind, limit_s=60)


@pytest.mark.parametrize(
    ("losses", "perplexity", "status"),
    [
        ([2.0, 1.5], 90.0, "passed"),
        ([2.0, 1.501], 90.5, "passed"),
        ([2.0, 1.6], 90.0, "failed"),
        ([2.0, 1.5], 100.0, "failed"),
        ([math.nan, 1.5], 90.0, "failed"),
        ([2.0, math.nan], 90.0, "failed"),
        ([2.0, math.inf], 90.0, "failed"),
    ],
)
def test_losses_and_perplexity_must_be_those_of_the_cpu(losses, perplexity, status):
    on_cpu = {"losses": [2.0, 1.5], "perplexity": 90.0}
    result = compare(job("training steps"), on_cpu, {"losses": losses, "perplexity": perplexity})
    assert result.status == status


@pytest.mark.process
def test_a_device_with_a_gpus_rules_gives_the_losses_of_the_cpu(tmp_path, monkeypatch):
    # The pretended device does not know inference tensors.
    monkeypatch.setattr(perplexity, "negative_log_likelihoods", torch.no_grad()(negative_log_likelihoods.__wrapped__))
    write_base(tmp_path / "base")
    on_cpu = smoke_run(tmp_path / "base", tmp_path / "cpu", "cpu")
    with pretended_gpu():
        on_device = smoke_run(tmp_path / "base", tmp_path / "gpu", "gpu:0")
    assert len(on_cpu["losses"]) == STEPS
    assert len(set(on_cpu["losses"])) == STEPS, "every step changes the student"
    result = compare(job("training steps"), on_cpu, on_device)
    assert result.status == "passed", result.reason


@pytest.mark.process
def test_tomoe_train_is_compared_with_the_cpus_run(tmp_path):
    options = Options(scratch=str(tmp_path), interpret=True)
    with pytest.raises(NotRunError, match="no losses of the CPU"):
        list(run(job("train on device"), options))
    (first,) = run(job("train on cpu"), options)
    assert len(first.values["cpu"]["losses"]) == STEPS
    (tmp_path / "train-on-device").rename(tmp_path / "before")
    (second,) = run(job("train on device"), options)
    assert second.status == "passed", second.reason
    assert second.values["device"] == first.values["cpu"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("kind", ["training steps", "train on device"])
def test_the_cpu_is_not_compared_with_itself(kind, tmp_path):
    with pytest.raises(RuntimeError, match="no GPU"):
        list(run(job(kind), Options(scratch=str(tmp_path))))


@pytest.mark.parametrize(("kind", "package"), [("train on cpu", "accelerate"), ("training steps", "pydantic")])
def test_a_missing_package_is_named(kind, package, monkeypatch):
    monkeypatch.setattr(training_jobs, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(NotRunError, match=f"{package} is not installed"):
        list(run(job(kind), Options()))
