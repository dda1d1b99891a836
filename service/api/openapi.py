"""The OpenAPI description as it really is: an error envelope for every fault, keys in either header,
a body to begin with for every endpoint that takes one.

FastAPI describes its own 422 answers, which this service never gives. Runs in the API process.
"""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from service.api.examples import EXAMPLES

_ENVELOPE = {
    "title": "ErrorEnvelope",
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_FAULT = {
    "description": "Refused or failed; `message` is advice, `param` names the field at fault",
    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorEnvelope"}}},
}
_REPLACED_SCHEMAS = ("HTTPValidationError", "ValidationError")


def describe_with_envelope(app: FastAPI) -> dict[str, Any]:
    """For `app.openapi`: made once, then kept."""
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
        for path, operations in schema["paths"].items():
            for operation in operations.values():
                if path in EXAMPLES and "requestBody" in operation:
                    operation["requestBody"]["content"]["application/json"]["example"] = EXAMPLES[path]
                operation["responses"].pop("422", None)
                operation["responses"].setdefault("default", _FAULT)
        components = schema.setdefault("components", {})
        schemas = components.setdefault("schemas", {})
        for name in _REPLACED_SCHEMAS:
            schemas.pop(name, None)
        schemas["ErrorEnvelope"] = _ENVELOPE
        components["securitySchemes"] = {
            "key": {"type": "http", "scheme": "bearer"},
            "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
        schema["security"] = [{"key": []}, {"x-api-key": []}, {}]
        app.openapi_schema = schema
    return app.openapi_schema
