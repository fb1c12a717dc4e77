"""Attention on pruned heads: projections, rotary embedding, value mask and KV cache layout."""
