"""Routes beside vLLM's: budget, experts, playground; also as a plugin for bare ``vllm serve``."""
