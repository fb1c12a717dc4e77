"""Baselines for ToMoE, one file each: same frozen model, data, tokens and active-parameter budget.

A baseline is a function from a :class:`~.setup.BaselineSetup` to the gates that it attaches to the model.
``tomoe eval compare`` (../compare.py) measures all of them. docs/compare.md describes them.
"""
