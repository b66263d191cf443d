"""The hot path: one routed request, from the model name it asked for to the reference kept for recording.

Wraps the endpoint of a completion route: assign a version, set `request.model` to it, call vLLM's own endpoint, keep
what it answered. No I/O, no parsing and no waiting of its own; what recording costs is paid by the recorder.
Knows nothing of the database or of how versions get loaded.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from scion_adapters.clock import new_id
from scion_adapters.errors import NotFoundError, UnavailableError
from scion_adapters.routing import Assignment, assign
from vllm_scion.capture import Capture
from vllm_scion.errors_http import explain, unavailable_response
from vllm_scion.handover import Handover
from vllm_scion.metrics import Metrics, shown_as
from vllm_scion.private_vllm import is_client_error, token_counts
from vllm_scion.serving import Flight, Serving
from vllm_scion.subject import CONVERSATION_HEADER, subject_of

EVALUATION_HEADER = "x-scion-evaluation"

Endpoint = Callable[[Any, Request], Coroutine[Any, Any, Any]]


def _record_ids() -> Iterator[str]:
    """Unique ones, without a system call for each."""
    return map(f"{new_id('rec')}-{{}}".format, itertools.count())


@dataclass(slots=True)
class Gateway:
    """What wrapped endpoints share. Made with the routes; the other fields are filled in before the server listens."""

    serving: Serving
    metrics: Metrics
    base_name: str = ""
    handover: Handover | None = None  # None: nothing is recorded
    hash_key: bytes = field(default=b"", repr=False)
    record_ids: Iterator[str] = field(default_factory=_record_ids, repr=False)

    def wrap(self, original: Endpoint, route: str, *, is_recorded: bool = True) -> Endpoint:
        """`original` behind routing and, if `is_recorded`, recording. `route` is its name in records and metrics."""
        observe = self.metrics["scion_request_overhead_seconds"].labels(route).observe
        clock = time.perf_counter

        @functools.wraps(original)  # FastAPI finds the request's type and the parameters through __wrapped__
        async def endpoint(request: Any, raw_request: Request) -> Any:
            started = clock()
            model = request.model
            published = self.serving.published
            if not model or _adapter_in(model) not in published.routing.adapters:
                return await original(request, raw_request)
            body = await raw_request.json()  # FastAPI parsed it already and the request keeps it
            evaluation_key = raw_request.headers.get(EVALUATION_HEADER)
            line = published.routing.adapters.get(model)
            is_split = line is not None and line.rollout_id is not None
            subject = subject_of(body, raw_request.headers) if is_split else ""
            try:
                assignment = assign(published.routing, model, subject, published.resident, evaluation_key)
            except NotFoundError as error:
                self.metrics.request(_adapter_in(model), None, route, "unknown")
                return _explained(await original(request, raw_request), str(error))
            except UnavailableError as error:
                self.metrics.request(_adapter_in(model), None, route, "unavailable")
                return unavailable_response(str(error), anthropic=route == "messages")
            if assignment is None:
                return await original(request, raw_request)
            call = _Call(self, route, assignment, model, started)
            if is_recorded and evaluation_key is None and self.handover is not None and body.get("store") is not False:
                call.keep(await raw_request.body(), raw_request)
            lora_id = assignment.lora_id
            if lora_id is None:
                request.model = self.base_name
            else:
                call.flight = Flight(self.serving.in_flight, lora_id)
                request.model = published.names[lora_id]
            called = clock()
            try:
                response = await original(request, raw_request)
            except BaseException as error:
                call.broke_off(error)
                raise
            answered = clock()
            if isinstance(response, StreamingResponse) and response.status_code == 200:
                response.body_iterator = call.relay(response.body_iterator)
            else:
                call.answered(response)
            observe(called - started + clock() - answered)
            return response

        return endpoint


class _Call:
    """One request that was assigned to a version."""

    __slots__ = (
        "_assignment",
        "_body",
        "_created_at",
        "_gateway",
        "_model",
        "_request",
        "_route",
        "_started",
        "flight",
    )

    def __init__(self, gateway: Gateway, route: str, assignment: Assignment, model: str, started: float) -> None:
        self._gateway = gateway
        self._route = route
        self._assignment = assignment
        self._model = model
        self._started = started
        self._body: bytes | None = None
        self._request: Request | None = None
        self.flight: Flight | None = None

    def keep(self, body: bytes, request: Request) -> None:
        """This answer is to be recorded."""
        self._body = body
        self._request = request
        self._created_at = time.time()

    def answered(self, response: Any) -> None:
        """A complete response (or None: the client left). It is recorded after the event loop has sent it off."""
        self._land()
        status = response.status_code if isinstance(response, Response) else 499
        if status == 200:
            self._count("ok")
            self._hand_over(bytes(response.body), None, is_stream=False)
        elif status == 499:
            self._count("cancelled")
        else:
            self._count("rejected" if status < 500 else "error")

    def broke_off(self, error: BaseException) -> None:
        self._land()
        if isinstance(error, asyncio.CancelledError):
            self._count("cancelled")
        else:
            self._count("rejected" if is_client_error(error) else "error")

    async def relay(self, chunks: AsyncIterable[Any]) -> AsyncIterator[Any]:
        """The stream as it is; afterwards, however it ended, what was sent of it is recorded."""
        sent: list[Any] = []
        first_at: float | None = None
        outcome = "cancelled"
        try:
            async for chunk in chunks:
                if first_at is None:
                    first_at = time.perf_counter()
                sent.append(chunk)
                yield chunk
            outcome = "ok"
        except Exception:
            outcome = "error"
            raise
        finally:  # nothing here may wait: the client may have gone and the generator be closing
            self._land()
            self._count(outcome)
            self._hand_over(sent, first_at, is_stream=True)

    def _hand_over(self, parts: Any, first_at: float | None, *, is_stream: bool) -> None:
        if self._body is not None and (handover := self._gateway.handover) is not None:
            handover.add(functools.partial(self._capture, parts, first_at, time.perf_counter(), is_stream=is_stream))

    def _capture(self, parts: Any, first_at: float | None, ended_at: float, *, is_stream: bool) -> Capture:
        assert self._body is not None
        assert self._request is not None
        return Capture(
            route=self._route,
            assignment=self._assignment,
            requested_model=self._model,
            body=self._body,
            conversation=self._request.headers.get(CONVERSATION_HEADER),
            token_counts=token_counts(self._request),
            parts=parts,
            stream=is_stream,
            created_at=self._created_at,
            latency_ms=(ended_at - self._started) * 1e3,
            first_token_ms=None if first_at is None else (first_at - self._started) * 1e3,
            hash_key=self._gateway.hash_key,
            record_id=next(self._gateway.record_ids),
        )

    def _count(self, outcome: str) -> None:
        adapter, number = shown_as(self._assignment.ref)
        self._gateway.metrics.request(adapter, number, self._route, outcome)

    def _land(self) -> None:
        if self.flight is not None:
            self.flight.land()


def _adapter_in(model: str) -> str:
    """`chat` out of `chat`, `chat:7` and `chat@champion`."""
    return model.partition(":")[0].partition("@")[0]


def _explained(response: Any, message: str) -> Any:
    is_404 = isinstance(response, Response) and response.status_code == 404
    return explain(response, message) if is_404 else response
