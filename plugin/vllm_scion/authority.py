"""Who may do what over HTTP: a table of scopes, and the middleware that holds requests against the key ring.

Unknown paths need `ops`, so that a new route is closed until somebody decides. A server for which no key was ever made
is open. Knows nothing of what the routes do; refusals are handed on (refusals.py).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Send

from scion_adapters.errors import InvalidInputError
from scion_adapters.keys import EMPTY_RING, KeyRing, Scope, key_id_of
from vllm_scion.errors_http import error_response

logger = logging.getLogger("vllm_scion")

OPEN = frozenset({"/health", "/ping", "/metrics", "/version", "/load"})
"""What probes, load balancers and Prometheus ask, without a key, as in vLLM itself."""

_CHAT = re.compile(
    r"POST /v1/(chat/completions|completions|responses|messages|messages/count_tokens)"
    r"|GET /v1/responses/[^/]+|POST /v1/responses/[^/]+/cancel"
    r"|POST /(tokenize|detokenize)"
    r"|GET /v1/models(/.+)?"
    r"|(POST|GET) /v1/feedback|(GET|DELETE) /v1/feedback/[^/]+"
)
_ANTHROPIC = "/v1/messages"


def required_scope(method: str, path: str) -> Scope | None:
    """The scope that a request needs, or None where none is needed."""
    if path.rstrip("/") in OPEN:
        return None
    return Scope.CHAT if _CHAT.fullmatch(f"{method} {path}") else Scope.OPS


@dataclass(frozen=True, slots=True)
class Refusal:
    """`reason`: missing, unknown, revoked or scope. `key_id` is the public part of what looked like a key."""

    reason: str
    method: str
    path: str
    client: str
    key_id: str | None


@dataclass(slots=True)
class Gatekeeper:
    """The ring in force, replaced as a whole when the routing is followed; `refused` is told of each refusal."""

    ring: KeyRing = EMPTY_RING
    refused: Callable[[Refusal], None] = lambda _: None
    has_vllm_key: bool = False

    def follow(self, ring: KeyRing) -> None:
        """Obey `ring` from here on.

        Not behind vLLM's own key: nobody could pass both, so the first key would cut every client off. vLLM's goes on
        guarding, and the next start is refused (check_access).
        """
        try:
            check_access(ring, self.has_vllm_key)
        except InvalidInputError as error:
            logger.error("scion keys are not in force: %s", error)
        else:
            self.ring = ring

    def judge(self, method: str, path: str, headers: Headers, client: str) -> tuple[Refusal | None, str | None]:
        """(why it is refused, None), or (None, whose key it is) when it may pass."""
        needed = required_scope(method, path)
        if self.ring.is_open or needed is None:
            return None, None
        presented = _presented(headers)
        key_id = key_id_of(presented or "")
        if presented is None:
            return Refusal("missing", method, path, client, None), None
        key = self.ring.check(presented)
        if key is None:
            known = self.ring.keys.get(key_id or "")
            reason = "revoked" if known is not None and known.revoked_at is not None else "unknown"
            return Refusal(reason, method, path, client, key_id), None
        if not key.scope.covers(needed):
            return Refusal("scope", method, path, client, key.id), None
        return None, key.name


class AuthorityMiddleware:
    """Plain ASGI, so that streams pass untouched. Sets `scope["state"]["scion_actor"]` to the key's name."""

    def __init__(self, app: ASGIApp, gatekeeper: Gatekeeper) -> None:
        self._app = app
        self._gatekeeper = gatekeeper

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        keeper = self._gatekeeper
        if keeper.ring.is_open or scope["type"] == "lifespan" or scope.get("method") == "OPTIONS":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        client = (scope.get("client") or ("unknown", 0))[0]
        refusal, actor = keeper.judge(scope.get("method", "GET"), path, Headers(scope=scope), client)
        if refusal is None:
            scope.setdefault("state", {})["scion_actor"] = actor
            await self._app(scope, receive, send)
            return
        keeper.refused(refusal)
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        await _answer(refusal)(scope, receive, send)


def check_access(ring: KeyRing, vllm_has_key: bool) -> None:
    """Raises InvalidInputError when vLLM's own key and ours would both want the one Authorization header."""
    if vllm_has_key and not ring.is_open:
        raise InvalidInputError(
            "there are scion keys (`scion keys list`), and vLLM has a key of its own (--api-key or VLLM_API_KEY): one "
            "request cannot carry both; drop vLLM's: scion keys guard every route",
            field="api_key",
        )


def _presented(headers: Headers) -> str | None:
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and value.strip():
        return value.strip()
    return headers.get("x-api-key")  # what Anthropic's clients send


def _answer(refusal: Refusal) -> JSONResponse:
    is_known = refusal.reason == "scope"
    status = 403 if is_known else 401
    message = (
        f"this key may ask and rate; {refusal.method} {refusal.path} needs a key of scope ops (`scion keys create`)"
        if is_known
        else "a valid API key is needed: send it as `Authorization: Bearer sk-scion-…`"
    )
    kind = "permission_error" if is_known else "authentication_error"
    if refusal.path.startswith(_ANTHROPIC):
        response = JSONResponse({"type": "error", "error": {"type": kind, "message": message}}, status_code=status)
    else:
        code = "insufficient_scope" if is_known else "invalid_api_key"
        response = error_response(status, message, kind=kind, code=code)
    if not is_known:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response
