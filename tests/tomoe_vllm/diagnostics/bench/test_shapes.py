"""The shapes of tomoe bench."""

import pytest

from tomoe_vllm.diagnostics.bench.shapes import SHAPES, shape_of


def test_shape_of_7b_layer_has_the_bytes_of_the_paper():
    assert SHAPES["7b-layer"].mlp_bytes == 2 * 270_532_608  # 270.5 MB in bfloat16


def test_unknown_shape_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match="shape is '2b'; it must be one of 135m, 1b, 7b, 7b-layer"):
        shape_of("2b")
