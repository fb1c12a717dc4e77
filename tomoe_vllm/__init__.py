"""ToMoE on vLLM: the method as it runs, and its vLLM plugin.

Importing this package costs nothing: it imports neither torch nor vllm.
"""

__version__ = "0.1.0"
