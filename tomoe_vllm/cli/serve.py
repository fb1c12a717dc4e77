"""``tomoe serve``."""

from typing import Any

import typer

from tomoe_vllm.cli.app import app, mark_engine_run
from tomoe_vllm.cli.options import Assignments, ConfigFile, settings_command


@settings_command(
    app,
    "tomoe_serving.server.settings:ServerSettings",
    argument="checkpoint",
    after_dashes="engine_args",
)
def serve(flags: dict[str, Any], config: ConfigFile = None, set_: Assignments = None) -> None:
    """Serve a checkpoint through the OpenAI API.

    Every setting is also an environment variable (--queue-size: TOMOE_QUEUE_SIZE) and a key of the --config file
    (queue_size). Times are in seconds if the name has no other unit. Flags of vLLM's engine go after --, as in:
    tomoe serve CHECKPOINT --port 8080 -- --max-model-len 4096
    """
    from tomoe_serving.server.settings import load_settings

    settings = load_settings(flags, set_ or [], config)
    from tomoe_training.artifacts.inspection import inspect

    facts = inspect(settings.checkpoint)
    if facts["kind"] != "checkpoint":
        raise ValueError(f"{settings.checkpoint} is an adapter: export it first (tomoe export)")
    from tomoe_serving.server.lifecycle import run_server

    mark_engine_run()
    raise typer.Exit(run_server(settings, facts))
