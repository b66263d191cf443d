"""The feedback routes: HTTP in, store calls in a thread, OpenAI-shaped errors out. 2xx is sent only after the commit.

What a vote is and when it repeats an earlier one is decided in scion_feedback; here are status codes, limits and
headers.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse

from scion_adapters.errors import ConflictError, InvalidInputError, NotFoundError, ScionError, UnavailableError
from scion_feedback.feedback import FeedbackStore
from scion_feedback.parsing import parse_feedback
from vllm_scion.errors_http import error_response, scion_error
from vllm_scion.metrics import Metrics
from vllm_scion.runtime import Runtime

logger = logging.getLogger("vllm_scion")

MAX_BODY_BYTES = 256 * 1024
"""Above the fields' own limits (16 Ki characters of comment and of correction, 16 KiB of metadata), even escaped."""

_VOTE_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["completion_id"],
    "additionalProperties": False,
    "properties": {
        "completion_id": {"type": "string", "description": "The `id` of the answer."},
        "choice_index": {"type": "integer", "default": 0, "description": "Which choice of an answer with n > 1."},
        "name": {"type": "string", "default": "rating", "description": "What is rated."},
        "value": {
            "description": 'true, 1 or "up"; false, -1, 0 or "down"; or a number from 0 to 1.',
            "anyOf": [{"type": "boolean"}, {"type": "number"}, {"enum": ["up", "down"]}],
        },
        "comment": {"type": "string"},
        "correction": {"type": "string", "description": "What the answer should have been."},
        "user": {"type": "string", "description": "Who votes; absent: the user of the completion."},
        "metadata": {"type": "object"},
        "id": {"type": "string", "description": "Chosen by the client, it makes a retry safe, like Idempotency-Key."},
    },
}
_VOTE_DOCS = {"requestBody": {"required": True, "content": {"application/json": {"schema": _VOTE_SCHEMA}}}}


def attach_feedback(app: FastAPI, running: Callable[[], Runtime], metrics: Metrics) -> None:
    """Add POST, GET and DELETE under /v1/feedback."""
    outcomes = metrics["scion_feedback_total"]

    async def answer(request: Request, work: Callable[[FeedbackStore], tuple[int, Any, str | None]]) -> JSONResponse:
        """`work` in a thread; it returns status, body and the outcome to count."""
        runtime = running()
        try:
            status, body, outcome = await runtime.in_thread(lambda: work(runtime.feedback))
        except ScionError as error:
            if request.method != "GET":
                outcomes.labels(_outcome_of(error)).inc()
            return scion_error(error)
        except Exception:  # disk full, a driver's surprise: never a 2xx, and always in OpenAI's shape
            logger.exception("%s %s", request.method, request.url.path)
            outcomes.labels("error").inc()
            return error_response(500, "the vote could not be handled; it was not stored", kind="server_error")
        if outcome is not None:
            outcomes.labels(outcome).inc()
        return JSONResponse(body, status_code=status)

    @app.post("/v1/feedback", tags=["feedback"], summary="Rate, comment or correct an answer", openapi_extra=_VOTE_DOCS)
    async def add_feedback(raw_request: Request) -> JSONResponse:
        try:
            body = await _read_json(raw_request)
            vote = parse_feedback(body, idempotency_key=raw_request.headers.get("idempotency-key"))
        except _TooLargeError:
            outcomes.labels("invalid").inc()
            return error_response(413, f"the body is larger than {MAX_BODY_BYTES} bytes", code="too_large")
        except InvalidInputError as error:
            outcomes.labels("invalid").inc()
            return scion_error(error)

        def store(feedback: FeedbackStore) -> tuple[int, Any, str | None]:
            result = feedback.add(vote)
            shown = {**result.row.to_json(), "completion_known": result.completion_known}
            return (201, shown, "created") if result.created else (200, shown, "repeated")

        return await answer(raw_request, store)

    @app.get("/v1/feedback/{feedback_id}", tags=["feedback"], summary="One vote")
    async def get_feedback(feedback_id: str, raw_request: Request) -> JSONResponse:
        return await answer(raw_request, lambda feedback: (200, feedback.get(feedback_id).to_json(), None))

    @app.delete("/v1/feedback/{feedback_id}", tags=["feedback"], summary="Take a vote back")
    async def delete_feedback(feedback_id: str, raw_request: Request) -> JSONResponse:
        def delete(feedback: FeedbackStore) -> tuple[int, Any, str | None]:
            feedback.delete(feedback_id, actor="http")
            return 200, {"id": feedback_id, "object": "feedback", "deleted": True}, "deleted"

        return await answer(raw_request, delete)

    @app.get("/v1/feedback", tags=["feedback"], summary="All votes about one answer")
    async def list_feedback(raw_request: Request) -> JSONResponse:
        completion_id = raw_request.query_params.get("completion_id")
        if not completion_id:
            message = "completion_id is missing: ask /v1/feedback?completion_id=<the id of the answer>"
            return error_response(400, message, param="completion_id", code="invalid_value")

        def find(feedback: FeedbackStore) -> tuple[int, Any, str | None]:
            rows = [row.to_json() for row in feedback.for_completion(completion_id)]
            return 200, {"object": "list", "data": rows, "has_more": False}, None

        return await answer(raw_request, find)


class _TooLargeError(Exception):
    pass


async def _read_json(request: Request) -> Any:
    """The body as JSON, read no further than the limit whatever Content-Length claims."""
    chunks: list[bytes] = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > MAX_BODY_BYTES:
            raise _TooLargeError
        chunks.append(chunk)
    try:
        return json.loads(b"".join(chunks))
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"the body is not JSON: {error}") from error


def _outcome_of(error: ScionError) -> str:
    match error:
        case ConflictError():
            return "conflict"
        case UnavailableError():
            return "unavailable"
        case InvalidInputError() | NotFoundError():
            return "invalid"
        case _:
            return "error"
