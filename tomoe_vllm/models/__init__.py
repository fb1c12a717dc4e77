"""vLLM models: they assemble. Layers own sharding and weight loading."""
