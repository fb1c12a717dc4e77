"""The ``/v1/tomoe`` routes and the playground under bare ``vllm serve``.

vLLM loads endpoint plugins only if VLLM_PLUGINS names them. That variable is an allow-list of all plugins:

    VLLM_PLUGINS=tomoe,tomoe_endpoints vllm serve ./llama2-tomoe

The queue, the measured step times and the SLO are null in the responses: only ``tomoe serve`` has them.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

from fastapi import FastAPI


class ToMoEEndpoints:
    """Implements vLLM's EndpointPlugin protocol."""

    name = "tomoe_endpoints"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self.app: FastAPI | None = None
        self.source: Any = None

    def attach_router(self, app: FastAPI) -> None:
        """Add the budget's route; vLLM calls this before the engine client exists."""
        from tomoe_serving.api.compute_budget import budget_router

        self.app = app
        app.include_router(budget_router(lambda: self.source))

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Set what the routes read. Raises ``ValueError`` for a model that is not a ToMoE checkpoint."""
        from tomoe_training.artifacts.inspection import inspect

        from tomoe_serving.api.experts import attach_experts
        from tomoe_serving.server.engine import bare_budget

        self.source = bare_budget(engine_client, args, inspect(Path(args.model)))
        assert self.app is not None
        attach_experts(self.app, engine_client)
