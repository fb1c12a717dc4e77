"""A model small enough that an engine on it starts in seconds."""

import pytest

from tomoe_vllm.diagnostics.bench.shapes import Shape


@pytest.fixture(scope="session")
def tiny_shape() -> Shape:
    return Shape(
        hidden_size=128, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32, vocab_size=96
    )
