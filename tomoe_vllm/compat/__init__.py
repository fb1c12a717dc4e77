"""Differences between vLLM's releases and builds."""
