"""The server an operator runs: OpenAI-compatible front on vLLM's async engine, with a fixed budget per token.

``engine.py`` is the only file that imports vllm. The rest is plain ASGI and can be read and tested without it.
"""
