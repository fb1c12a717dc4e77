"""Replacing what runs a layer of vLLM, and attention backends with a value size of their own."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tomoe_vllm.compat.layers import (
    UnquantizedFusedMoEMethod,
    UnquantizedLinearMethod,
    diffkv_backend,
    replace_quant_method,
)


class OwnMethod(UnquantizedLinearMethod):
    pass


def test_unquantized_method_is_replaced():
    layer = nn.Module()
    layer.quant_method = UnquantizedLinearMethod()
    method = OwnMethod()
    replace_quant_method(layer, method)
    assert layer.quant_method is method


@pytest.mark.parametrize("present", [None, UnquantizedFusedMoEMethod])
def test_other_methods_are_left_alone(present):
    layer = nn.Module()
    if present is not None:
        layer.quant_method = present.__new__(present)
    with pytest.raises(TypeError, match="OwnMethod is not"):
        replace_quant_method(layer, OwnMethod())


def test_each_value_size_has_a_backend_of_its_own(monkeypatch):
    """A draft model with other widths in the process must not change those of the target."""
    from vllm.v1.attention.backends import triton_attn, triton_attn_diffkv

    seen = []
    monkeypatch.setattr(triton_attn_diffkv, "unified_attention_diffkv", lambda **kwargs: seen.append(kwargs["v"].shape))
    target, draft = diffkv_backend(96), diffkv_backend(48)
    assert target is diffkv_backend(96)
    assert target.full_cls_name() != draft.full_cls_name()
    assert (target.head_size_v, draft.head_size_v) == (96, 48)
    assert target.get_name() == draft.get_name() == "TRITON_ATTN_DIFFKV"

    metadata = SimpleNamespace(num_actual_tokens=1, **dict.fromkeys(METADATA))
    for backend, size in ((target, 96), (draft, 48), (target, 96)):
        impl = backend.get_impl_cls().__new__(backend.get_impl_cls())
        vars(impl).update(dict.fromkeys(IMPL), head_size=64, kv_cache_dtype="auto", scale=1.0)
        heads = torch.zeros(1, 2, 64)
        cache = torch.zeros(3, 2, 16, 64 + size)
        impl.forward(nn.Module(), heads, heads, None, cache, metadata, torch.zeros(1, 2, size))
        assert seen.pop()[-1] == size

    def build(self, kv_cache_spec, layer_names, vllm_config, device):
        vars(self).update(num_heads_q=2, num_par_softmax_segments=4, seq_threshold_3D=8)
        self.softmax_segm_max = torch.zeros(8, 2, 4)

    monkeypatch.setattr(triton_attn.TritonAttentionMetadataBuilder, "__init__", build)
    for backend, size in ((target, 128), (draft, 64), (target, 128)):  # powers of two
        builder = backend.get_builder_cls()(None, [], None, torch.device("cpu"))
        assert builder.softmax_segm_output.shape[-1] == size


METADATA = (
    "query_start_loc", "seq_lens", "block_table", "max_query_len", "seq_threshold_3D", "num_par_softmax_segments",
    "softmax_segm_output", "softmax_segm_max", "softmax_segm_expsum", "use_cascade",
)  # fmt: skip
IMPL = ("alibi_slopes", "use_alibi_sqrt", "sliding_window", "logits_soft_cap", "sinks")
