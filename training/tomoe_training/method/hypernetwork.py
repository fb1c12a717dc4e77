"""The hypernetwork (eq. 1): expert embeddings for every module, from fixed random inputs.

A one-layer bidirectional GRU runs over the 2L modules in the order of the model (attention 0, MLP 0,
attention 1, ...) with the N experts as its batch. Embeddings of neighbouring layers therefore depend on each
other. ``is_local`` replaces it by free embeddings (the paper's "local emb" ablation).
"""

import torch
from torch import Tensor, nn

INPUT_SIZE = 32  # appendix A.1: z is N x 32 per module


class Hypernetwork(nn.Module):
    """Expert embeddings [2L, N, R], float32.

    ``z`` is a fixed buffer, as in the paper. (The released code trains it by accident.)
    """

    def __init__(self, *, num_modules: int, num_experts: int, embedding_size: int, is_local: bool = False):
        super().__init__()
        self.is_local = is_local
        if is_local:
            self.embeddings = nn.Parameter(0.5 * torch.randn(num_modules, num_experts, embedding_size))
            return
        if embedding_size % 2:
            raise ValueError(f"value_router_dim is {embedding_size}; it must be even (two GRU directions)")
        self.register_buffer("z", torch.randn(num_modules, num_experts, INPUT_SIZE))
        self.gru = nn.GRU(INPUT_SIZE, embedding_size // 2, bidirectional=True)

    def forward(self) -> Tensor:
        if self.is_local:
            return self.embeddings
        return self.gru(self.z)[0]
