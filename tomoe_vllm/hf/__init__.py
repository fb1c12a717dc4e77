"""The part of ToMoE that is shipped inside every checkpoint: config, equations and reference model.

It imports only torch and transformers, so that a checkpoint loads with ``trust_remote_code=True`` where this
package is not installed.
"""
