"""The decoder's norms against their formulas in float64."""

import pytest
import torch

from tests.helpers.compare import assert_close, is_close

EPS = 1e-5


@pytest.fixture(autouse=True)
def vllm_config():
    """Eager mode, which uses vLLM's compiled kernels; torch.compile uses plain torch and fuses it."""
    from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig(compilation_config=CompilationConfig(custom_ops=["all"]))):
        yield


def make_norm(hidden: int, dtype: torch.dtype = torch.float32):
    from tomoe_vllm.layers.norm import ToMoERMSNorm

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
    assert torch.equal(x, before), "without a residual the input is not modified"
    with_residual, new_residual = norm(x, residual)
    assert normed.shape == with_residual.shape == (tokens, hidden)
    if tokens:
        assert_close(normed, expected(before, norm.weight))
        assert_close(with_residual, expected(total, norm.weight))
        assert torch.equal(new_residual, total)


def test_with_a_residual_both_tensors_are_overwritten():
    norm, x, residual = make_norm(64), random(3, 64), random(3, 64, seed=2)
    outputs = norm(x, residual)
    assert [output.data_ptr() for output in outputs] == [x.data_ptr(), residual.data_ptr()]


def test_rows_do_not_depend_on_the_batch():
    norm, x = make_norm(576), random(33, 576)
    assert torch.equal(norm(x)[7:8], norm(x[7:8].clone()))


def test_heads_of_a_fused_projection_do_not_depend_on_the_batch():
    """Heads of one token are contiguous and those of several are not; both must use the same kernel."""
    norm, qkv = make_norm(64), random(9, 16 * 64)
    heads, alone = (rows[:, : 12 * 64].unflatten(-1, (-1, 64)) for rows in (qkv, qkv[4:5]))
    assert alone.is_contiguous()
    assert not heads.is_contiguous()
    assert torch.equal(norm(heads)[4:5], norm(alone))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_norm_is_within_one_rounding_of_the_output(dtype):
    norm, x = make_norm(96, dtype), random(9, 96).to(dtype)
    assert_close(norm(x), expected(x, norm.weight), limit=0.5 * torch.finfo(dtype).eps)


def test_heads_within_a_larger_tensor():
    """q is a strided view into a fused projection."""
    norm, qkv = make_norm(32), random(5, 4 * 32)
    heads = qkv[:, 32:96].unflatten(-1, (2, 32))
    assert_close(norm(heads), expected(heads, norm.weight))
    assert torch.equal(qkv, random(5, 4 * 32))


@pytest.mark.parametrize("part", ["x", "residual"])
def test_strided_rows(part):
    """vLLM's kernel assumes contiguous rows without checking."""
    norm, tensors = make_norm(64), {"x": random(3, 64), "residual": random(3, 64, seed=2)}
    total = tensors["x"] + tensors["residual"]
    tensors[part] = torch.cat([tensors[part], torch.full((3, 8), torch.nan)], dim=1)[:, :64]
    normed, new_residual = norm(**tensors)
    assert torch.equal(new_residual, total)
    assert_close(normed, expected(total, norm.weight))


def test_a_weight_of_another_dtype():
    """vLLM's kernel needs input and weight of the same dtype."""
    norm, x = make_norm(96), random(9, 96).bfloat16()
    assert_close(norm(x), expected(x, norm.weight), limit=0.5 * torch.finfo(torch.bfloat16).eps)


def test_a_norm_over_a_part_of_the_columns():
    """vLLM's kernel ignores ``var_hidden_size`` without an error."""
    from tomoe_vllm.layers.norm import ToMoERMSNorm

    norm, x = ToMoERMSNorm(64, eps=EPS, var_hidden_size=32), random(3, 64)
    rms = (x[:, :32].double().square().mean(dim=-1, keepdim=True) + EPS).sqrt()
    assert_close(norm(x), x.double() / rms)


def test_layer_norm_adds_the_residual_first():
    from tomoe_vllm.layers.norm import ToMoELayerNorm

    norm, x, residual = ToMoELayerNorm(48), random(4, 48), random(4, 48, seed=2)
    normed, total = norm(x, residual)
    assert torch.equal(total, x + residual)
    assert_close(normed, torch.nn.functional.layer_norm(total.double(), (48,)))


def test_tolerance_catches_a_forgotten_epsilon():
    norm, x = make_norm(64), 0.01 * random(3, 64)
    assert is_close(norm(x), expected(x, norm.weight))
    assert not is_close(norm(x), expected(x, norm.weight, eps=0.0))


def test_on_cuda_it_is_the_norm_that_vllm_runs_for_dense_models():
    """tomoe bench compares with the dense model as shipped there: both sides must run the same kernel."""
    from vllm.model_executor.layers.layernorm import RMSNorm

    from tomoe_vllm.layers.norm import ToMoERMSNorm

    ours = {name for name in vars(ToMoERMSNorm) if not name.startswith("__")}
    assert ours == {"forward_cpu"}, "everything but the CPU's forward is vLLM's"
    assert ToMoERMSNorm.name == RMSNorm.name, "vLLM switches custom ops on and off by this name"
