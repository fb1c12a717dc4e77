"""Which checks there are, and in which order."""

import json

import pytest

from tomoe_vllm.diagnostics.full.plan import Options, make_plan, process_environment, read_jobs, write_jobs
from tomoe_vllm.diagnostics.layers import MAX_GATHER_TOKENS
from tomoe_vllm.diagnostics.tune import NUM_TOKENS


@pytest.fixture(scope="module")
def plan():
    return make_plan(Options(scratch="/scratch"))


def kernels(plan, layer, dtype):
    jobs = [job for job in plan if job.kind == "kernel"]
    return [job.arguments for job in jobs if (job.arguments["layer"], job.arguments["dtype"]) == (layer, dtype)]


def sizes(arguments, path):
    return [a["num_tokens"] for a in arguments if (a["path"], a["routing"]) == (path, "random")]


@pytest.mark.parametrize("layer", ["LLaMA-2 7B", "Phi-2"])
def test_every_size_that_tune_may_choose_is_checked_in_bfloat16(plan, layer):
    arguments = kernels(plan, layer, "bfloat16")
    assert sizes(arguments, "gather") == [n for n in NUM_TOKENS if n <= MAX_GATHER_TOKENS]
    for path in ("dense", "grouped", "route", "mask_values", "activation"):
        assert sizes(arguments, path) == list(NUM_TOKENS)


@pytest.mark.parametrize("layer", ["LLaMA-2 7B, TP 2", "LLaMA-2 7B, TP 4", "LLaMA-2 7B, TP 8"])
def test_every_kernel_is_checked_on_shares(plan, layer):
    for path in ("gather", "dense", "grouped", "route", "mask_values", "activation"):
        assert sizes(kernels(plan, layer, "bfloat16"), path)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_dtypes_are_checked_at_some_sizes(plan, dtype):
    assert set(sizes(kernels(plan, "LLaMA-2 7B", dtype), "grouped")) < set(NUM_TOKENS)


def test_the_order_is_by_worth_and_parts_keep_their_processes_together(plan):
    stages = list(dict.fromkeys(job.process for job in plan))
    first = stages[: stages.index("training steps, device and CPU")]
    assert first == ["kernels", "models of the engine checks", "vLLM, dense", "vLLM, masked", "vLLM, shared"]
    assert stages[-2:] == ["vLLM, observer", "vLLM, fused"]
    assert plan[0].kind == "rates"
    assert len({job.name for job in plan}) == len(plan)


def test_only_the_named_parts_are_planned():
    assert {job.part for job in make_plan(Options(), ("training",))} == {"training"}


def test_sizes_of_a_model_replace_those_of_llama(tmp_path):
    config = {
        "model_type": "llama", "hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 4,
        "expert_intermediate_sizes": [704],
    }  # fmt: skip
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    layers = Options(model=str(tmp_path / "model")).layers()
    assert list(layers) == ["model", "model, TP 2", "model, TP 4", "Phi-2"], "8 ranks cannot share 4 heads"
    assert layers["model, TP 4"].mlp.num_neurons == 352


def test_the_interpreter_checks_tiny_sizes_and_no_bfloat16():
    plan = make_plan(Options(interpret=True))
    jobs = [job for job in plan if job.kind == "kernel"]
    assert {job.arguments["dtype"] for job in jobs} == {"float32", "float16"}
    assert max(job.arguments["num_tokens"] for job in jobs) == 20
    assert {job.arguments["layer"] for job in jobs} == {"tiny", "tiny, TP 2", "tiny without gate"}
    assert not any(job.kind == "rates" for job in plan)


def test_only_kernels_are_interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    options = Options(interpret=True)
    by_part = {job.part: process_environment(job, options) for job in make_plan(options)}
    assert by_part["kernels"]["TRITON_INTERPRET"] == "1"
    assert all("TRITON_INTERPRET" not in by_part[part] for part in ("engine", "training"))
    assert all(variables["CUDA_VISIBLE_DEVICES"] == "" for variables in by_part.values())
    job = make_plan(Options())[0]
    assert "TRITON_INTERPRET" not in process_environment(job, Options())


def test_jobs_are_read_as_they_were_written(plan, tmp_path):
    write_jobs(plan, Options(model="m", scratch="s"), tmp_path / "jobs.json")
    assert read_jobs(tmp_path / "jobs.json") == (plan, Options(model="m", scratch="s"))
