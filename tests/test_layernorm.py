"""The decoder's norms against their formulas, in float64."""

import pytest
import torch

from tests.helpers.compare import assert_close, is_close

EPS = 1e-5


@pytest.fixture(autouse=True)
def vllm_config():
    """Eager, where vLLM's compiled kernels run; torch.compile takes the plain form and fuses it."""
    from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig(compilation_config=CompilationConfig(custom_ops=["all"]))):
        yield


def make_norm(hidden: int, dtype: torch.dtype = torch.float32):
    from tomoe_vllm.layers.layernorm import ToMoERMSNorm

    norm = ToMoERMSNorm(hidden, eps=EPS, dtype=dtype)
    norm.weight.data.copy_(1 + 0.3 * torch.randn(hidden, generator=torch.Generator().manual_seed(0)))
    return norm


def random(*shape, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def expected(x: torch.Tensor, weight: torch.Tensor, eps: float = EPS) -> torch.Tensor:
    x = x.double()
    return x / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("hidden", [16, 75, 576, 2048])
@pytest.mark.parametrize("tokens", [0, 1, 5, 64])
def test_rms_norm_equals_the_formula(tokens, hidden):
    norm, x, residual = make_norm(hidden), random(tokens, hidden), random(tokens, hidden, seed=2)
    before = x.clone()
    normed, total = norm(x), x + residual
    assert torch.equal(x, before), "without a residual the input belongs to the caller"
    with_residual, new_residual = norm(x, residual)
    assert normed.shape == with_residual.shape == (tokens, hidden)
    if tokens:
        assert_close(normed, expected(before, norm.weight))
        assert_close(with_residual, expected(total, norm.weight))
        assert torch.equal(new_residual, total)


def test_no_tensor_is_made_where_there_is_a_residual():
    norm, x, residual = make_norm(64), random(3, 64), random(3, 64, seed=2)
    outputs = norm(x, residual)
    assert [output.data_ptr() for output in outputs] == [x.data_ptr(), residual.data_ptr()]


def test_rows_do_not_depend_on_the_batch():
    norm, x = make_norm(576), random(33, 576)
    assert torch.equal(norm(x)[7:8], norm(x[7:8].clone()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision_is_that_of_the_output(dtype):
    norm, x = make_norm(96, dtype), random(9, 96).to(dtype)
    assert_close(norm(x), expected(x, norm.weight), limit=1.3 * torch.finfo(dtype).eps)


def test_heads_within_a_larger_tensor():
    """q of a fused projection: its rows lie apart."""
    norm, qkv = make_norm(32), random(5, 4 * 32)
    heads = qkv[:, 32:96].unflatten(-1, (2, 32))
    assert_close(norm(heads), expected(heads, norm.weight))
    assert torch.equal(qkv, random(5, 4 * 32))


def test_a_weight_of_another_dtype():
    norm, x = make_norm(96), random(9, 96).bfloat16()
    assert_close(norm(x), expected(x, norm.weight), limit=1.3 * torch.finfo(torch.bfloat16).eps)


def test_layer_norm_adds_the_residual_first():
    from tomoe_vllm.layers.layernorm import ToMoELayerNorm

    norm, x, residual = ToMoELayerNorm(48), random(4, 48), random(4, 48, seed=2)
    normed, total = norm(x, residual)
    assert torch.equal(total, x + residual)
    assert_close(normed, torch.nn.functional.layer_norm(total.double(), (48,)))


def test_tolerance_catches_a_forgotten_epsilon():
    norm, x = make_norm(64), 0.01 * random(3, 64)
    assert is_close(norm(x), expected(x, norm.weight))
    assert not is_close(norm(x), expected(x, norm.weight, eps=0.0))
