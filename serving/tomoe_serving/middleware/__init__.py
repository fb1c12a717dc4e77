"""ASGI middleware around vLLM's app, one class a file."""
