"""Errors of ours as HTTP answers: in OpenAI's shape on our routes, in the route's own shape on vLLM's."""

from __future__ import annotations

import json

from starlette.responses import JSONResponse, Response

from scion_adapters.errors import (
    ConflictError,
    InvalidInputError,
    NotFoundError,
    RejectedError,
    ScionError,
    UnavailableError,
)

RETRY_AFTER_S = 1


def error_response(
    status: int, message: str, *, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> JSONResponse:
    """`{"error": {"message", "type", "param", "code"}}`; 503 carries Retry-After."""
    headers = {"Retry-After": str(RETRY_AFTER_S)} if status == 503 else None
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(body, status_code=status, headers=headers)


def scion_error(error: ScionError) -> JSONResponse:
    """The answer for an error of ours."""
    message = str(error)
    match error:
        case InvalidInputError():
            return error_response(400, message, param=error.field, code="invalid_value")
        case NotFoundError():
            return error_response(404, message, code="not_found")
        case ConflictError():
            return error_response(409, message, code="conflict")
        case RejectedError():
            return error_response(422, message, code=error.reason)
        case UnavailableError():
            return error_response(503, message, kind="service_unavailable", code="unavailable")
        case _:
            return error_response(500, message, kind="server_error")


def unavailable_response(message: str, *, anthropic: bool) -> JSONResponse:
    """503 on a completion route, in the shape that its clients parse."""
    if not anthropic:
        return error_response(503, message, kind="service_unavailable", param="model", code="unavailable")
    body = {"type": "error", "error": {"type": "overloaded_error", "message": message}}
    return JSONResponse(body, status_code=503, headers={"Retry-After": str(RETRY_AFTER_S)})


def explain(response: Response, message: str) -> Response:
    """vLLM's own 404 with our explanation added to its message; everything else about it stays vLLM's."""
    try:
        body = json.loads(bytes(response.body))
        body["error"]["message"] = f"{body['error']['message']} {message}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return response
    return JSONResponse(body, status_code=response.status_code)
