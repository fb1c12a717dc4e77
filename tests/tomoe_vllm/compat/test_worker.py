"""Steps of both model runners of vLLM, as stand-ins with their signatures.

The real class of the second one: tests/tomoe_vllm/observability/test_worker_extension.py.
"""

from types import SimpleNamespace

import pytest

from tomoe_vllm.compat.worker import StepObserver


class FirstRunner:
    """vllm.v1.worker.gpu_model_runner.GPUModelRunner; the last parameter is one that a release might add."""

    def __init__(self, padded=None):
        hidden_states = None if padded is None else SimpleNamespace(shape=(padded, 8))
        self.execute_model_state = SimpleNamespace(hidden_states=hidden_states)
        self.input_batch = SimpleNamespace(req_ids=["a", "b"])

    def execute_model(self, scheduler_output, intermediate_tensors=None, defer=False):
        return "output"


class SecondRunner:
    """vllm.v1.worker.gpu.model_runner.GPUModelRunner, which has no ``input_batch`` of its own."""

    def __init__(self, padded=16, num_tokens=5):
        batch = SimpleNamespace(req_ids=["a", "b"], num_tokens=num_tokens, num_tokens_after_padding=padded)
        self.execute_model_state = SimpleNamespace(input_batch=batch, hidden_states=None)

    def execute_model(self, scheduler_output, intermediate_tensors=None, dummy_run=False, is_profile=False):
        return "output"


def scheduled(num_tokens):
    return SimpleNamespace(total_num_scheduled_tokens=num_tokens)


def observed(runner):
    steps = []
    observer = StepObserver(runner, steps.append)
    observer.attach()
    return steps, observer


@pytest.mark.parametrize(
    ("runner", "num_padded"), [(FirstRunner(), 5), (FirstRunner(padded=8), 8), (SecondRunner(padded=16), 16)]
)
def test_step_has_its_requests_and_its_padding(runner, num_padded):
    steps, _ = observed(runner)
    output = scheduled(5)
    assert runner.execute_model(output, None) == "output"
    (step,) = steps
    assert (step.num_tokens, step.num_padded_tokens, step.request_ids) == (5, num_padded, ["a", "b"])
    assert step.scheduler_output is output


def test_tokens_that_are_scheduled_but_not_run_are_left_out():
    steps, _ = observed(runner := SecondRunner(num_tokens=4))
    runner.execute_model(scheduled(6))
    assert steps[0].num_tokens == 4


@pytest.mark.parametrize("runner", [FirstRunner(), SecondRunner(num_tokens=3)])
def test_arguments_may_be_passed_by_keyword(runner):
    steps, _ = observed(runner)
    runner.execute_model(intermediate_tensors=None, scheduler_output=scheduled(3))
    assert [step.num_tokens for step in steps] == [3]


def test_warm_up_is_not_a_step():
    runner = SecondRunner()
    steps, _ = observed(runner)
    runner.execute_model(scheduled(4), None, True)
    runner.execute_model(scheduled(4), dummy_run=True)
    assert steps == []
    runner.execute_model(scheduled(4), None, False, True)
    assert len(steps) == 1


def test_another_flag_in_the_place_of_dummy_run_is_not_taken_for_it():
    runner = FirstRunner()
    steps, _ = observed(runner)
    runner.execute_model(scheduled(4), None, True)
    assert len(steps) == 1


@pytest.mark.parametrize("runner", [FirstRunner(), SecondRunner()])
def test_step_without_tokens_reads_no_batch(runner):
    runner.execute_model_state = None
    steps, _ = observed(runner)
    runner.execute_model(scheduled(0))
    assert (steps[0].num_tokens, steps[0].num_padded_tokens, steps[0].request_ids) == (0, 0, [])


def test_detached_observer_sees_nothing():
    runner = FirstRunner()
    steps, observer = observed(runner)
    observer.detach()
    runner.execute_model(scheduled(4))
    assert steps == []
    observer.attach()
    runner.execute_model(scheduled(4))
    assert len(steps) == 1


def test_unknown_signature_is_refused():
    runner = SimpleNamespace(execute_model=lambda batch: None)
    with pytest.raises(ValueError, match=r"\(batch\); it must take scheduler_output"):
        StepObserver(runner, print)
