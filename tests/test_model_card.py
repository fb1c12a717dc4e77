"""The card of a checkpoint states what it is made of."""

import pytest

from tests.helpers.students import adapter_of, random_student
from training.model_card import model_card


@pytest.mark.parametrize("training", [{}, {"steps": 12, "tokens": 768, "seconds": 7200.0, "data": ["a.txt", "self"]}])
def test_card_states_budget_data_and_base(training, dense_folder):
    student = random_student(dense_folder())
    widths = student.settle_widths()
    config = adapter_of(student, dense_folder()).config
    config.training = training
    card = model_card(config, widths, student.shape)
    assert f"{widths.active_parameters(student.shape):,} of {student.shape.total_parameters * 2:,}" in card
    assert config.base_model_hash in card
    assert "None" not in card
    if training:
        assert "a.txt, self" in card
        assert "12, 768" in card
        assert "2.00 h" in card
