"""The expert activation in plain torch, for any device and dtype and under torch.compile."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
}
"""By Hugging Face's ``hidden_act``. The C++ kernels have the same names (``kActivations`` in simd/vectors.h)."""


def expert_activation_reference(projected: Tensor, expert_ids: Tensor, expert_masks: Tensor, activation: str) -> Tensor:
    """See :func:`tomoe_vllm.kernels.expert_activation.expert_activation`.

    Multiplies in place into the activation's output, which saves two temporaries of [T, F]: measured 1.2 to 1.4 times
    the time of the dense activation instead of 1.9 times.
    """
    num_neurons = expert_masks.shape[1]
    hidden = ACTIVATIONS[activation](projected[..., :num_neurons])
    if projected.shape[-1] != num_neurons:
        hidden.mul_(projected[..., num_neurons:])
    return hidden.mul_(expert_masks.index_select(0, expert_ids))
