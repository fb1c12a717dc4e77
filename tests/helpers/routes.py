"""The routes that the Hugging Face reference model takes: what traces and counts of the engine are compared with."""

import numpy as np
import torch

from tomoe_vllm.hf.configuration_tomoe import family_of


@torch.no_grad()
def reference_routes(model, token_ids: list[int]) -> np.ndarray:
    """Expert of every token at every layer: [T, L] uint8, from the inputs of the MLPs and the routers' weights."""
    family, inputs = family_of(model.config), []
    handles = [
        layer.get_submodule(family.mlp_in).register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        for layer in model.model.layers
    ]
    try:
        model(torch.tensor([token_ids]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    routers = [layer.mlp.expert_gate.router.weight for layer in model.model.layers]
    logits = [x.reshape(-1, x.shape[-1]).double() @ w.double().T for x, w in zip(inputs, routers, strict=True)]
    return torch.stack([x.argmax(dim=-1) for x in logits], dim=1).to(torch.uint8).numpy()


def expert_counts(routes: list[np.ndarray], num_experts: int) -> np.ndarray:
    """Tokens per layer and expert, [L, N], of several requests' routes."""
    together = np.concatenate(routes)
    return np.stack([np.bincount(together[:, i], minlength=num_experts) for i in range(together.shape[1])])
