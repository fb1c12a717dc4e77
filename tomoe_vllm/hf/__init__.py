"""The part of ToMoE that is shipped inside every checkpoint: config, equations, reference model.

Imports torch and transformers only, and nothing else of this project, so that a checkpoint loads
with ``trust_remote_code=True`` where the package is not installed.
"""
