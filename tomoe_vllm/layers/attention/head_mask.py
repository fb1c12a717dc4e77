"""The masks over the dims of attention heads: static Q/K dims, and V/O dims that are static or depend on the token."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from vllm.model_executor.utils import set_weight_attrs

from tomoe_vllm.hf.configuration_tomoe import block_shape
from tomoe_vllm.hf.tomoe_math import mask_heads
from tomoe_vllm.kernels.ops import ValueRouter
from tomoe_vllm.kernels.value_mask import mask_values


class ToMoEHeadMask(nn.Module):
    """Masks over the dims of a head, shared by all heads and replicated on every tensor-parallel rank.

    ``query_key_dims``, ``value_dims`` (only with vo_mode "static"): [A] uint8, the checkpoint's masks;
    ``query_key_mask``, ``static_value_mask``: [A], the same in the model's dtype, set by :meth:`finish_loading`. Before
    a checkpoint is loaded they keep the right number of dims, so ``--load-format dummy``, which does not set integers,
    works too.

    Raises ``ValueError`` while loading if a mask has another shape, dtype or number of dims than the config says.
    """

    query_key_mask: Tensor
    static_value_mask: Tensor

    def __init__(self, config: PreTrainedConfig, layer_idx: int, prefix: str) -> None:
        super().__init__()
        shape, rank = block_shape(config), config.value_router_dim
        self.prefix = prefix
        self.head_dim = shape.head_dim
        self.vo_mode, self.top_k = config.vo_mode, config.vo_head_dims[layer_idx]
        num_query_key = config.qk_head_dims[layer_idx]
        self.widths = {"query_key_dims": num_query_key, "value_dims": self.top_k}
        self.mask_names = {"query_key_dims": "query_key_mask"} | (
            {"value_dims": "static_value_mask"} if self.vo_mode == "static" else {}
        )
        self._add_dims(
            "query_key_dims", "query_key_mask", _initial_dims(num_query_key, shape.head_dim, shape.rotary_dim)
        )
        if self.vo_mode == "static":
            self._add_dims("value_dims", "static_value_mask", torch.arange(shape.head_dim) < self.top_k)
        elif self.vo_mode == "dynamic":
            self.value_down = nn.Linear(shape.hidden_size, rank, dtype=torch.float32)
            self.value_norm = nn.LayerNorm(rank, dtype=torch.float32)
            self.value_up = nn.Linear(rank, shape.head_dim, bias=False, dtype=torch.float32)

    def _add_dims(self, name: str, mask_name: str, kept: Tensor) -> None:
        def load(param: nn.Parameter, loaded: Tensor) -> None:
            if loaded.shape != param.shape or loaded.dtype != torch.uint8:
                raise ValueError(
                    f"{self.prefix}.{name} is {loaded.dtype} {list(loaded.shape)}; it must be uint8 [{self.head_dim}]"
                )
            if (num_kept := int(loaded.count_nonzero())) != self.widths[name]:
                raise ValueError(
                    f"{self.prefix}.{name} keeps {num_kept} dims; config.json says {self.widths[name]}. "
                    "Export the checkpoint again"
                )
            param.data.copy_(loaded)

        parameter = nn.Parameter(kept.to(torch.uint8), requires_grad=False)
        set_weight_attrs(parameter, {"weight_loader": load})
        self.register_parameter(name, parameter)
        self.register_buffer(mask_name, kept.to(torch.get_default_dtype()), persistent=False)

    def _num_kept(self, name: str) -> int:
        return int(getattr(self, name).count_nonzero())

    def kept_dims(self, name: str) -> Tensor:
        """The checkpoint's mask ``name``, [A], to prune weights by.

        Where sleep level 2 discarded it, the mask before: pruned shapes stay right until :meth:`finish_loading` raises.
        """
        return getattr(self, name if self._num_kept(name) == self.widths[name] else self.mask_names[name])

    def finish_loading(self) -> None:
        """Set the masks in the model's dtype, after loading.

        Raises ``ValueError`` for a mask of another number of dims than was loaded: sleep level 2 discards parameters.
        """
        for name, mask_name in self.mask_names.items():
            if (num_kept := self._num_kept(name)) != self.widths[name]:
                raise ValueError(
                    f"{self.prefix}.{name} keeps {num_kept} dims and was loaded with {self.widths[name]}, as after "
                    "sleep level 2; include the masks in the reload"
                )
            getattr(self, mask_name).copy_(getattr(self, name))

    def mask_query_key(self, heads: Tensor) -> Tensor:
        """Zero the pruned Q/K dims of every head: [T, H * A] -> [T, H * A]."""
        is_whole = self.widths["query_key_dims"] == self.head_dim
        return heads if is_whole else mask_heads(heads, self.query_key_mask)

    def mask_value(self, attention: Tensor, hidden_states: Tensor) -> Tensor:
        """Apply the value mask to the attention output (eq. 4). [T, H * A] and hidden states [T, D] -> [T, H * A]."""
        if self.vo_mode == "none" or self.top_k == self.head_dim:
            return attention
        if self.vo_mode == "static":
            return mask_heads(attention, self.static_value_mask)
        down, norm, up = self.value_down, self.value_norm, self.value_up
        router = ValueRouter(down.weight, down.bias, norm.weight, norm.bias, up.weight)
        return mask_values(attention, hidden_states, router, self.top_k)


def _initial_dims(width: int, head_dim: int, rotary_dim: int) -> Tensor:
    """[A] bool with ``width`` ones: whole RoPE pairs, filled up with unrotated dims."""
    num_singles = min(width, head_dim - rotary_dim)
    num_singles -= (width - num_singles) % 2
    pairs = torch.arange(rotary_dim // 2) < (width - num_singles) // 2
    return torch.cat([pairs, pairs, torch.arange(head_dim - rotary_dim) < num_singles])
