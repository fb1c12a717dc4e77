"""Correctness and speed on this machine: ``tomoe doctor``, ``tomoe bench`` and ``tomoe tune``."""
