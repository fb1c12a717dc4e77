"""Ops of ToMoE: one folder per op, schemas in ops.py, compiled by build.py. See README.md."""
