"""The ``tomoe`` command: one module for each group of commands. Commands import the project when they run."""

from tomoe_vllm.cli.app import main

from . import convert, serve, evaluate, diagnostics  # isort: skip  # in the order of tomoe --help

__all__ = ["convert", "diagnostics", "evaluate", "main", "serve"]
