"""The vLLM model: it assembles layers. The layers own sharding and weight loading."""
