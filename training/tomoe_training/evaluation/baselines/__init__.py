"""The rivals of ToMoE, one file each, on the same frozen model, data, tokens and active-parameter budget.

A rival is a function from a :class:`~.setup.Contest` to the gates it would put on the
model. ``tomoe eval compare`` (../compare.py) runs them all; docs/compare.md describes them.
"""
