"""The endpoint plugin of bare ``vllm serve``; tests/e2e/test_wheel.py sends requests to one."""

import tomllib

from tests.helpers.processes import REPOSITORY

GROUP = "vllm.endpoint_plugins"


def _entry_points() -> dict[str, str]:
    return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["entry-points"][GROUP]


def test_entry_point_is_a_plugin_for_text_generation():
    from fastapi import FastAPI
    from tomoe_serving.api.vllm_endpoint_plugin import ToMoEEndpoints

    assert _entry_points() == {ToMoEEndpoints.name: f"{ToMoEEndpoints.__module__}:{ToMoEEndpoints.__name__}"}
    app = FastAPI()
    ToMoEEndpoints().attach_router(app)
    assert "/v1/tomoe/budget" in app.openapi()["paths"]
    assert ToMoEEndpoints.required_tasks == ("generate",)
