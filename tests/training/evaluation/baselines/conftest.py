"""A contest on a tiny model: what every rival is given."""

import pytest
from tomoe_training.config import RunConfig
from tomoe_training.data import InterleavedBlocks, load_documents, pack
from tomoe_training.evaluation.baselines.setup import Contest

from tests.helpers.dense_models import dense_model, word_tokenizer
from tests.helpers.students import SETTINGS


@pytest.fixture
def contest(dense_folder, text_file, tmp_path):
    """``contest(family, active_ratio=0.7)``: a fresh tiny model and its text."""

    def make(family="llama", **fields):
        folder = dense_folder(family)
        settings = {"sequence_length": 32, "batch_size": 2, "steps": 3, "warm_start_tokens": 256, "dtype": "float32"}
        config = RunConfig(
            base=str(folder), data=[str(text_file)], tensorboard=False, **(SETTINGS | settings | fields)
        )  # fmt: skip
        blocks = pack(load_documents(str(text_file)), word_tokenizer(), config.sequence_length)
        return Contest(
            base=dense_model(family).requires_grad_(False),
            config=config,
            blocks=InterleavedBlocks([blocks], config.seed),
            work=tmp_path,
        )

    return make
