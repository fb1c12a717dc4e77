"""vLLM layers of ToMoE: they own tensor-parallel sharding and weight loading."""
