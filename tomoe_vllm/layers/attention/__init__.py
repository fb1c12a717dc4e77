"""Attention on pruned head dims: projections, rotary embedding, value mask and the layout of the KV cache."""
