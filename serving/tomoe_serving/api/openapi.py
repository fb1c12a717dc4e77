"""The OpenAPI document says which errors the layers in front of a route can answer."""

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
    400: "The request is malformed or asks for what cannot be served",
    401: "The API key is missing or not known",
    404: "No such model, response or route",
    405: "The route does not take this method",
    503: "The server drains or its engine has died; see Retry-After",
}
WITH_BODY = {
    408: "The body did not arrive in time",
    413: "The body is larger than the server takes",
    429: "The queue is full; see Retry-After",
    500: "The engine failed on this request",
}
PROBES = {"/health", "/ready", "/metrics"}


def document_errors(app: FastAPI) -> None:
    """Make ``app.openapi()`` name every status that the layers of app.py answer."""
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
                answer = {"description": text, "content": {"application/json": {"schema": schema}}}
                responses[str(status)] = answer
            if method == "post":
                # vLLM answers what FastAPI would answer with 422 as 400.
                responses.pop("422", None)
    return document
