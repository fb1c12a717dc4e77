"""vLLM layers of ToMoE: each owns its tensor-parallel sharding and weight loading."""
