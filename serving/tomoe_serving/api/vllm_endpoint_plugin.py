"""The ``/v1/tomoe`` routes under bare ``vllm serve``, without the rest of ``tomoe serve``.

vLLM loads endpoint plugins only when VLLM_PLUGINS names them, and that variable is an allow-list for all plugins:

    VLLM_PLUGINS=tomoe,tomoe_endpoints vllm serve ./llama2-tomoe

What only ``tomoe serve`` knows (queue, measured step time, SLO) is null in the answers.
"""

from argparse import Namespace
from pathlib import Path
from typing import Any

from fastapi import FastAPI


class ToMoEEndpoints:
    """vLLM's EndpointPlugin protocol."""

    name = "tomoe_endpoints"
    required_tasks = ("generate",)

    def __init__(self) -> None:
        self.app: FastAPI | None = None
        self.source: Any = None

    def attach_router(self, app: FastAPI) -> None:
        """Routes; vLLM calls it before the engine client is known."""
        from tomoe_serving.api.active_budget import budget_router

        self.app = app
        app.include_router(budget_router(lambda: self.source))

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """What the routes read. Raises ``ValueError`` for a model that is not a ToMoE checkpoint."""
        from tomoe_training.artifacts.inspection import inspect

        from tomoe_serving.api.experts import attach_experts
        from tomoe_serving.server.engine import bare_budget
        from tomoe_serving.server.settings import ServerSettings

        settings = ServerSettings(checkpoint=Path(args.model))
        self.source = bare_budget(engine_client, args, inspect(settings.checkpoint))
        assert self.app is not None
        attach_experts(self.app, engine_client, settings)
