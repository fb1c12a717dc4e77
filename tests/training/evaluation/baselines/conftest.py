"""Baseline setups on tiny models."""

import pytest
import torch
from tomoe_training.config import RunConfig
from tomoe_training.data import InterleavedBlocks, pack
from tomoe_training.documents import load_documents
from tomoe_training.evaluation.baselines.setup import BaselineSetup

from tests.helpers.dense_models import dense_model, word_tokenizer
from tests.helpers.students import SETTINGS


@pytest.fixture
def make_setup(dense_folder, text_file, tmp_path):
    """``make_setup(family, active_ratio=0.7)``: a new tiny model and its text."""

    def make(family="llama", **fields):
        settings = {"base": str(dense_folder(family)), "data": [str(text_file)], "tensorboard": False}
        settings |= {"sequence_length": 32, "batch_size": 2, "steps": 3, "warm_start_tokens": 256, "dtype": "float32"}
        config = RunConfig(**(SETTINGS | settings | fields))
        blocks = pack(load_documents(str(text_file)), word_tokenizer(), config.sequence_length)
        return BaselineSetup(
            base=dense_model(family).requires_grad_(False),
            config=config,
            blocks=InterleavedBlocks([blocks], config.seed),
            work=tmp_path,
        )

    return make


@pytest.fixture
def model_by_hand():
    """One layer of 4 neurons and 2 heads of 4 dims (one K/V head); Q/K units are the pairs (0, 2) and (1, 3)."""
    model = dense_model(
        "llama", hidden_size=2, intermediate_size=4, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=4,
    )  # fmt: skip
    layer = model.model.layers[0]
    weights = {
        "mlp.down_proj": [[1, -5, 0, 2], [-1, 2, 4, 2]],  # column sums of |W|: 2, 7, 4, 4
        "self_attn.o_proj": [[1, 2, 0, 0, 3, 0, 0, 1], [0, 0, -1, 0, 0, 0, 1, 0]],
        "self_attn.q_proj": [[1, 0], [2, 0], [0, 3], [0, 0], [0, -1], [1, 0], [0, 0], [2, 0]],
        "self_attn.k_proj": [[2, 0], [1, 0], [1, 0], [0, 2]],
    }
    with torch.no_grad():
        for name, rows in weights.items():
            layer.get_submodule(name).weight.copy_(torch.tensor(rows, dtype=torch.float32))
    return model


@pytest.fixture
def setup_by_hand(model_by_hand):
    """:func:`model_by_hand` with a budget of 0.5."""
    blocks = InterleavedBlocks([torch.zeros(4, 4).long()], 0)
    return BaselineSetup(base=model_by_hand, config=RunConfig(active_ratio=0.5), blocks=blocks, work=None)
