import pytest
from tomoe_training.config import load_run_config

from tests.helpers.runs import SETTINGS


@pytest.fixture
def config(dense_folder, text_file):
    """``config(steps=3)``: a run on the tiny llama and its text."""

    def make(**fields):
        settings = SETTINGS | {"base": str(dense_folder()), "data": [str(text_file)]}
        return load_run_config(None, settings | fields, [])

    return make
