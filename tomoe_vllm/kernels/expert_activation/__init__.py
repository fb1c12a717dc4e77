"""The activation of an MLP and the mask of each token's expert, as one step between two GEMMs.

    hidden = act(gate) * up * mask[expert of the token]      gated (SwiGLU)
    hidden = act(up) * mask[expert of the token]             not gated (Phi)

With it a dense MLP computes ToMoE (eq. 3 and appendix B.3, "pseudo-MoE"): the GEMMs on both sides stay those of the
dense model, so vLLM's quantization, LoRA and tensor parallelism apply to them.

Masks are a table [N, F] in the model's dtype, not signature bits. Measured for F = 1536 on one core (the dense
activation alone takes 6 us for 1 token and 17 us for 16): table 8 and 22 us, bits 18 and 34 us.
"""

from torch import Tensor

from tomoe_vllm.kernels.expert_activation.reference import ACTIVATIONS, expert_activation_reference


def require_activation(name: str) -> None:
    """Raise ``ValueError`` unless ``name`` (a Hugging Face ``hidden_act``) is supported."""
    if name not in ACTIVATIONS:
        raise ValueError(f"hidden_act is {name!r}; supported are {', '.join(sorted(ACTIVATIONS))}")


def expert_activation(projected: Tensor, expert_ids: Tensor, expert_masks: Tensor, activation: str) -> Tensor:
    """Activate ``projected`` and zero the neurons that each token's expert does not keep.

    ``projected``: [T, 2F] with the gate first, or [T, F] without a gate; float32, bfloat16 or float16.
    ``expert_ids``: [T] int64. ``expert_masks``: [N, F] of ones and zeros, dtype of ``projected``.
    ``activation``: a Hugging Face ``hidden_act``. Returns [T, F]. No host sync, static shapes.

    Raises ``ValueError`` for an unknown activation or widths that do not fit together.
    """
    require_activation(activation)
    num_neurons = expert_masks.shape[1]
    if projected.shape[-1] not in (num_neurons, 2 * num_neurons):
        raise ValueError(
            f"projected has {projected.shape[-1]} columns; for masks of {num_neurons} neurons it must have "
            f"{2 * num_neurons} (gate and up) or {num_neurons} (no gate)"
        )
    return expert_activation_reference(projected, expert_ids, expert_masks, activation)
