"""Terms of the loss on the device, and what is read of them."""

import pytest
import torch
from tomoe_training.terms import TermHistory

NAMES = ("loss", "task")


def _history(*rows):
    history = TermHistory()
    for step, row in enumerate(rows):
        history.add(step, NAMES, torch.tensor(row, dtype=torch.float64))
    return history


def test_reading_gives_the_last_step_and_can_be_repeated():
    history = _history([3.0, 2.0], [1.5, 1.0])
    assert history.read() == {"loss": 1.5, "task": 1.0}
    assert history.read() == {"loss": 1.5, "task": 1.0}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_first_step_that_is_not_finite_is_named_with_its_terms(value):
    history = _history([3.0, 2.0], [value, 7.25], [float("nan"), float("nan")])
    with pytest.raises(FloatingPointError, match=rf"not finite at step 2: loss {value}, task 7\.25\. The last"):
        history.read()


def test_adding_does_not_read_the_device():
    history = TermHistory()
    history.add(0, NAMES, torch.zeros(2, dtype=torch.float64, device="meta"))  # a value cannot be read from "meta"
    with pytest.raises(RuntimeError, match="meta"):
        history.read()
