"""``tomoe serve``: an OpenAI-compatible server around vLLM's async engine, with a fixed compute budget per token.

``server/engine.py`` is the only module that uses vLLM. The rest is plain ASGI and is tested without it.
"""
