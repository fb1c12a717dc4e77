"""Product of neurons and the mask of each token's expert: the largest additional cost of a training step.

``neurons * (routes @ masks)`` multiplies by all experts to select one row, and saves a [T, F] mask for the
backward pass. Here rows are indexed, forward and backward, and only the neurons are saved.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _MaskByExpert(torch.autograd.Function):
    @staticmethod
    def forward(ctx, neurons: Tensor, soft_routes: Tensor, masks: Tensor, experts: Tensor):
        # Zeros and ones are exact in any dtype; bfloat16 halves the memory traffic of [T, F].
        rows = masks.to(neurons.dtype)
        ctx.save_for_backward(neurons, rows, experts)
        ctx.dtypes = soft_routes.dtype, masks.dtype
        return rows.index_select(0, experts.flatten()).view_as(neurons).mul_(neurons)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):
        neurons, rows, experts = ctx.saved_tensors
        (gradient,), (soft_dtype, mask_dtype) = grad_outputs, ctx.dtypes
        of_neurons = of_routes = of_masks = None
        if any(ctx.needs_input_grad[1:3]):
            of_mask = (gradient * neurons).flatten(0, -2)
            of_routes = (of_mask @ rows.T).unflatten(0, experts.shape).to(soft_dtype)
            routes = torch.nn.functional.one_hot(experts.flatten(), len(rows)).to(of_mask.dtype)
            of_masks = (routes.T @ of_mask).to(mask_dtype)
        if ctx.needs_input_grad[0]:
            of_neurons = rows.index_select(0, experts.flatten()).view_as(neurons).mul_(gradient)
        return of_neurons, of_routes, of_masks, None


def mask_by_expert(neurons: Tensor, soft_routes: Tensor, masks: Tensor, experts: Tensor) -> Tensor:
    """``neurons * (routes @ masks)`` where routes is the one-hot of ``experts`` with the gradient of ``soft_routes``.

    neurons: [..., F] float32 or bfloat16; soft_routes: [..., N] float32, used for the gradient only; masks: [N, F]
    float32 of ones and zeros; experts: [...] int64. Returns [..., F] in the neurons' dtype. Not twice differentiable.
    """
    return _MaskByExpert.apply(neurons, soft_routes, masks, experts)
