"""Differences between vLLM's releases and builds.

vLLM has no stable interface below its documented one. Names that are private, or that moved between supported
releases, are imported from here only:

``layers``  base classes and functions behind a layer's ``quant_method``, the fused MoE and the attention backends
``ops``     compiled operators of the CPU build
``server``  the API server and the engine client; imported by ``tomoe_serving.server.engine`` only
``worker``  the step loop of a worker's model runner

``contract`` declares the attributes and signatures used, and ``check`` (``make compat``) resolves all of it against
the source of each supported release.
"""
