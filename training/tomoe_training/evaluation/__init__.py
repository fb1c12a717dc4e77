"""Perplexity, downstream tasks, and the comparison with baselines."""
