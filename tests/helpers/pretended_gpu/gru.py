"""The GRU cell of devices without cuDNN: torch asks each accelerator for a fused kernel, and the CPU has none."""

import torch
from torch import Tensor


def _forward(
    input_gates: Tensor, hidden_gates: Tensor, hx: Tensor, input_bias: Tensor | None, hidden_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``aten::_thnn_fused_gru_cell``: the new state [B, H], and a workspace [B, 5 H] for the backward pass."""
    if input_bias is not None and hidden_bias is not None:
        input_gates, hidden_gates = input_gates + input_bias, hidden_gates + hidden_bias
    (ir, iz, i_new), (hr, hz, h_new) = input_gates.chunk(3, dim=1), hidden_gates.chunk(3, dim=1)
    reset, update = torch.sigmoid(ir + hr), torch.sigmoid(iz + hz)
    new = torch.tanh(i_new + reset * h_new)
    return new + update * (hx - new), torch.cat([reset, update, new, hx, h_new], dim=1)


def _backward(grad: Tensor | None, workspace: Tensor, has_bias: bool) -> tuple[Tensor | None, ...]:
    """``aten::_thnn_fused_gru_cell_backward``: gradients of both gates, the state and both biases."""
    if grad is None:
        return (None,) * 5
    reset, update, new, hx, h_new = workspace.chunk(5, dim=1)
    g_new = grad * (1 - update) * (1 - new * new)
    g_update = grad * (hx - new) * update * (1 - update)
    g_reset = g_new * h_new * reset * (1 - reset)
    g_input = torch.cat([g_reset, g_update, g_new], dim=1)
    g_hidden = torch.cat([g_reset, g_update, g_new * reset], dim=1)
    biases = (g_input.sum(dim=0), g_hidden.sum(dim=0)) if has_bias else (None, None)
    return g_input, g_hidden, grad * update, *biases


_library = torch.library.Library("aten", "IMPL")  # its kernels last as long as it does


def register() -> None:
    """Register both kernels."""
    _library.impl("_thnn_fused_gru_cell", _forward, "PrivateUse1")
    _library.impl("_thnn_fused_gru_cell_backward", _backward, "PrivateUse1")
