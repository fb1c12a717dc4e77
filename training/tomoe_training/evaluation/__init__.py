"""Perplexity, downstream tasks, and the comparison with other methods."""
