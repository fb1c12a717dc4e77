"""Routes beside vLLM's own: budget, experts, the playground; and the same for bare ``vllm serve``."""
