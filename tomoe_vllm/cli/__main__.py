"""``python -m tomoe_vllm.cli``: the ``tomoe`` command."""

from tomoe_vllm.cli import main

main()
