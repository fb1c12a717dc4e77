"""Adds the errors of the layers in front of the routes to the OpenAPI document."""

from typing import Any

from fastapi import FastAPI

ERROR_NAME = "OpenAIError"
ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "code": {"anyOf": [{"type": "integer"}, {"type": "string"}, {"type": "null"}]},
            },
        }
    },
}

EVERYWHERE = {
    400: "The request is malformed or not supported",
    401: "The API key is missing or not valid",
    404: "The model, response or route does not exist",
    405: "The route does not support this method",
    503: "The server is stopping or its engine has died; see Retry-After",
}
WITH_BODY = {
    408: "The body did not arrive in time",
    413: "The body is larger than the limit",
    429: "The queue is full; see Retry-After",
    500: "The engine failed on this request",
}
PROBES = {"/health", "/ready", "/metrics"}


def document_errors(app: FastAPI) -> None:
    """Make ``app.openapi()`` list every status that the layers of ``server/app.py`` can respond with."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _with_errors(generate())
        return app.openapi_schema

    app.openapi_schema = None
    app.openapi = openapi  # type: ignore[method-assign]


def _with_errors(document: dict[str, Any]) -> dict[str, Any]:
    document.setdefault("components", {}).setdefault("schemas", {})[ERROR_NAME] = ERROR_SCHEMA
    schema = {"$ref": f"#/components/schemas/{ERROR_NAME}"}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            responses = operation.setdefault("responses", {})
            if path in PROBES:
                responses.setdefault("503", {"description": EVERYWHERE[503]})
                continue
            statuses = EVERYWHERE | (WITH_BODY if method in ("post", "put", "patch", "delete") else {})
            for status, text in statuses.items():
                response = {"description": text, "content": {"application/json": {"schema": schema}}}
                responses[str(status)] = response
            if method == "post":
                # vLLM responds with 400 where FastAPI would respond with 422.
                responses.pop("422", None)
    return document
