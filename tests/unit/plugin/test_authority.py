"""Scopes and the key ring, without a server: every route has a decided scope, and nothing malformed gets in."""

from __future__ import annotations

import asyncio
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from scion_adapters.errors import InvalidInputError
from scion_adapters.keys import EMPTY_RING, ApiKey, KeyRing, Scope, key_id_of
from vllm_scion.authority import AuthorityMiddleware, Gatekeeper, Refusal, check_access, required_scope
from vllm_scion.refusals import MAX_KINDS, Refusals, beginning

SECRET = "x" * 43
PLAIN = f"sk-scion-{'a' * 12}-{SECRET}"
OPS = f"sk-scion-{'b' * 12}-{SECRET}"
GONE = f"sk-scion-{'c' * 12}-{SECRET}"


def ring() -> KeyRing:
    import hashlib

    plain = {"a" * 12: PLAIN, "b" * 12: OPS, "c" * 12: GONE}
    keys = {
        "a" * 12: ApiKey("a" * 12, "shop", Scope.CHAT, 0.0, "me", None),
        "b" * 12: ApiKey("b" * 12, "night shift", Scope.OPS, 0.0, "me", None),
        "c" * 12: ApiKey("c" * 12, "old", Scope.OPS, 0.0, "me", 1.0),
    }
    hashes = {key_id: hashlib.sha256(value.encode()).hexdigest() for key_id, value in plain.items()}
    return KeyRing(MappingProxyType(keys), MappingProxyType(hashes))


SCOPES = [
    # what probes ask
    ("GET", "/health", None),
    ("GET", "/ping", None),
    ("POST", "/ping", None),
    ("GET", "/metrics", None),
    ("GET", "/metrics/", None),
    ("GET", "/version", None),
    ("GET", "/load", None),
    # what a chat application does
    ("POST", "/v1/chat/completions", Scope.CHAT),
    ("POST", "/v1/completions", Scope.CHAT),
    ("POST", "/v1/responses", Scope.CHAT),
    ("GET", "/v1/responses/resp_1", Scope.CHAT),
    ("POST", "/v1/responses/resp_1/cancel", Scope.CHAT),
    ("POST", "/v1/messages", Scope.CHAT),
    ("POST", "/v1/messages/count_tokens", Scope.CHAT),
    ("POST", "/tokenize", Scope.CHAT),
    ("POST", "/detokenize", Scope.CHAT),
    ("GET", "/v1/models", Scope.CHAT),
    ("POST", "/v1/feedback", Scope.CHAT),
    ("GET", "/v1/feedback", Scope.CHAT),
    ("GET", "/v1/feedback/f1", Scope.CHAT),
    ("DELETE", "/v1/feedback/f1", Scope.CHAT),
    # what moves traffic, or shows more than a chat application's own
    ("GET", "/v1/scion/status", Scope.OPS),
    ("GET", "/v1/adapters", Scope.OPS),
    ("POST", "/v1/adapters/chat/versions", Scope.OPS),
    ("POST", "/v1/load_lora_adapter", Scope.OPS),
    ("POST", "/v1/unload_lora_adapter", Scope.OPS),
    # ways around the wrapped routes
    ("POST", "/invocations", Scope.OPS),
    ("POST", "/inference/v1/generate", Scope.OPS),
    ("POST", "/v1/chat/completions/batch", Scope.OPS),
    ("POST", "/scale_elastic_ep", Scope.OPS),
    ("GET", "/docs", Scope.OPS),
    # nobody decided
    ("PUT", "/v1/feedback/f1", Scope.OPS),
    ("GET", "/v1/feedback/export/all", Scope.OPS),
    ("POST", "/v1/chat/completions/", Scope.OPS),
    ("POST", "//v1/chat/completions", Scope.OPS),
    ("GET", "/health/../v1/scion/status", Scope.OPS),
    ("GET", "/health/v1/scion/status", Scope.OPS),
    ("GET", "/v1/models\n", Scope.OPS),
    ("get", "/v1/models", Scope.OPS),
    ("POST", "/V1/completions", Scope.OPS),
    ("", "", Scope.OPS),
]


@pytest.mark.parametrize(("method", "path", "scope"), SCOPES)
def test_the_scope_of_each_route(method: str, path: str, scope: Scope | None) -> None:
    assert required_scope(method, path) is scope


def judge(
    headers: dict[str, str], method: str = "POST", path: str = "/v1/chat/completions"
) -> tuple[str | None, object]:
    refusal, actor = Gatekeeper(ring()).judge(method, path, Headers(headers), "10.0.0.1")
    return (refusal.reason if refusal else None), actor


@pytest.mark.parametrize(
    ("headers", "path", "reason", "actor"),
    [
        ({}, "/v1/chat/completions", "missing", None),
        ({}, "/health", None, None),
        ({"authorization": f"Bearer {PLAIN}"}, "/v1/chat/completions", None, "shop"),
        ({"authorization": f"bearer  {PLAIN} "}, "/v1/chat/completions", None, "shop"),
        ({"x-api-key": PLAIN}, "/v1/messages", None, "shop"),
        ({"authorization": f"Basic {PLAIN}"}, "/v1/chat/completions", "missing", None),
        ({"authorization": "Bearer "}, "/v1/chat/completions", "missing", None),
        ({"authorization": f"Bearer {PLAIN[:-1]}y"}, "/v1/chat/completions", "unknown", None),
        ({"authorization": f"Bearer {PLAIN}x"}, "/v1/chat/completions", "unknown", None),
        ({"authorization": f"Bearer sk-scion-{'d' * 12}-{SECRET}"}, "/v1/chat/completions", "unknown", None),
        ({"authorization": f"Bearer {GONE}"}, "/v1/chat/completions", "revoked", None),
        ({"authorization": f"Bearer {PLAIN}"}, "/v1/scion/status", "scope", None),
        ({"authorization": f"Bearer {OPS}"}, "/v1/scion/status", None, "night shift"),
        ({"authorization": f"Bearer {OPS}"}, "/v1/chat/completions", None, "night shift"),
    ],
)
def test_who_may_pass(headers: dict[str, str], path: str, reason: str | None, actor: str | None) -> None:
    assert judge(headers, path=path) == (reason, actor)


@given(st.text(max_size=200))
def test_nothing_but_a_key_is_a_key(text: str) -> None:
    assert ring().check(text) is None
    assert ring().check(PLAIN + text) is None or text == ""
    assert key_id_of(text) is None


def test_an_empty_ring_lets_everybody_pass_and_revoked_keys_do_not() -> None:
    assert Gatekeeper(EMPTY_RING).judge("POST", "/v1/adapters", Headers({}), "x") == (None, None)
    only_revoked = KeyRing(MappingProxyType({"c" * 12: ring().keys["c" * 12]}), MappingProxyType({}))
    assert not only_revoked.is_open


def test_a_key_of_vllm_and_ours_exclude_each_other() -> None:
    check_access(EMPTY_RING, vllm_has_key=True)
    check_access(ring(), vllm_has_key=False)
    with pytest.raises(InvalidInputError, match="cannot carry both"):
        check_access(ring(), vllm_has_key=True)


def test_behind_vllms_key_the_first_scion_key_cuts_nobody_off(caplog: pytest.LogCaptureFixture) -> None:
    keeper = Gatekeeper(has_vllm_key=True)
    keeper.follow(ring())
    assert keeper.ring.is_open, "vLLM's own key guards"
    assert "not in force" in caplog.text
    keeper = Gatekeeper()
    keeper.follow(ring())
    assert not keeper.ring.is_open


# --- the middleware ---------------------------------------------------------------------------------------------------


async def call(
    headers: list[tuple[bytes, bytes]], *, keys: KeyRing | None = None, **scope: Any
) -> tuple[list[dict[str, Any]], list[Refusal]]:
    """What the middleware sends, before an application that sends three pieces; and what it refused."""
    sent: list[dict[str, Any]] = []
    refused: list[Refusal] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for piece in (b"a", b"b", b"c"):
            await send({"type": "http.response.body", "body": piece, "more_body": piece != b"c"})
            assert sent[-1]["body"] == piece, "held back"

    async def receive() -> Any:
        raise AssertionError("a refusal needs no body")

    async def send(message: Any) -> None:
        sent.append(message)

    request = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, **scope}
    if request["type"] == "websocket":
        del request["method"]  # as ASGI has it
    keeper = Gatekeeper(ring() if keys is None else keys, refused.append)
    await AuthorityMiddleware(app, keeper)(request, receive, send)
    return sent, refused


async def test_pieces_pass_one_by_one() -> None:
    for keys in (ring(), EMPTY_RING):
        sent, refused = await call([(b"authorization", f"Bearer {PLAIN}".encode())], keys=keys)
        assert [message.get("body") for message in sent] == [None, b"a", b"b", b"c"]
        assert refused == []


async def test_a_websocket_needs_a_key_too() -> None:
    socket = {"type": "websocket", "path": "/v1/realtime"}
    for plain, reason in ((None, "missing"), (PLAIN, "scope"), (GONE, "revoked")):
        headers = [(b"authorization", f"Bearer {plain}".encode())] if plain else []
        sent, refused = await call(headers, **socket)
        assert sent == [{"type": "websocket.close", "code": 1008}]
        assert [r.reason for r in refused] == [reason]
    sent, _ = await call([(b"authorization", f"Bearer {OPS}".encode())], **socket)
    assert len(sent) == 4


async def test_where_a_proxys_prefix_is_configured_it_changes_nothing() -> None:
    key = [(b"authorization", f"Bearer {PLAIN}".encode())]
    for path, status in (("/api/v1/completions", 200), ("/api/v1/adapters", 403), ("/api/health/x", 403)):
        sent, _ = await call(key, root_path="/api", path=path)
        assert sent[0]["status"] == status, path
    assert (await call([], root_path="/api", path="/api/health"))[0][0]["status"] == 200


HEADER = st.sampled_from([b"authorization", b"x-api-key", b"Authorization", b"x-api-key "])
VALUE = st.one_of(
    st.binary(max_size=120),
    st.sampled_from([b"Bearer", b"Bearer ", b"Bearer Bearer", b"bearer\t", b"Basic Og==", b"Bearer sk-scion-"]),
    st.binary(max_size=20).map(lambda noise: b"Bearer " + PLAIN.encode() + b"\xff" + noise),
    st.binary(max_size=20).map(lambda noise: b"Bearer " + noise + b"," + PLAIN.encode()),
    st.binary(max_size=20).map(lambda noise: b"Basic " + noise + b" " + PLAIN.encode()),
)


@given(st.lists(st.tuples(HEADER, VALUE), max_size=4))
def test_malformed_headers_are_refused_and_break_nothing(headers: list[tuple[bytes, bytes]]) -> None:
    sent, (refusal,) = asyncio.run(call(headers))
    assert sent[0]["status"] == 401
    assert dict(sent[0]["headers"])[b"www-authenticate"] == b"Bearer"
    assert SECRET.encode() not in sent[1]["body"]
    assert SECRET not in repr(refusal)


# --- what is written down ---------------------------------------------------------------------------------------------


def refusal(client: str = "10.0.0.1", path: str = "/v1/models", key_id: str | None = None) -> Refusal:
    return Refusal("missing", "GET", path, client, key_id)


def test_a_flood_is_one_event_a_minute_with_a_count() -> None:
    now = 0.0
    refusals = Refusals(lambda: now)
    refusals.add(refusal())
    assert [count for _, _, count in refusals.take_due()] == [1]
    for _ in range(1000):
        refusals.add(refusal())
    now = 59.0
    assert refusals.take_due() == []
    now = 60.0
    assert [count for _, _, count in refusals.take_due()] == [1000]
    now = 120.0
    assert refusals.take_due() == []
    assert refusals._counts == {}, "what fell silent is forgotten"


def test_many_clients_do_not_fill_the_memory() -> None:
    refusals = Refusals(lambda: 0.0)
    for number in range(3 * MAX_KINDS):
        refusals.add(refusal(client=f"client-{number}"))
    due = refusals.take_due()
    assert len(due) <= MAX_KINDS + 1
    assert sum(count for _, _, count in due) == 3 * MAX_KINDS


@pytest.mark.parametrize(
    ("path", "shown"),
    [
        ("/v1/models", "/v1/models"),
        ("/v1/feedback/f1", "/v1/feedback/…"),
        ("/", "/*"),
        (f"/v1/{PLAIN}", "/v1/*"),  # a key that strayed into a path
        ("/v1/a\x00\x1b[2J", "/v1/*"),  # what a database or a terminal would choke on
        ("/" + "x" * 5000, "/*"),
    ],
)
def test_of_a_path_its_beginning_is_written_down(path: str, shown: str) -> None:
    assert beginning(path) == shown


def test_walking_through_paths_is_one_kind() -> None:
    refusals = Refusals(lambda: 0.0)
    for number in range(100):
        refusals.add(refusal(path=f"/v1/feedback/{number}"))
    assert [(kind[2], count) for kind, _, count in refusals.take_due()] == [("/v1/feedback/…", 100)]


def test_an_event_names_a_key_of_its_own_time() -> None:
    now = 0.0
    refusals = Refusals(lambda: now)
    refusals.add(refusal(key_id="first"))
    refusals.take_due()
    refusals.add(refusal(key_id="second"))
    now = 60.0
    assert [(first.key_id, count) for _, first, count in refusals.take_due()] == [("second", 1)]


def test_what_is_still_silent_is_written_at_the_end() -> None:
    refusals = Refusals(lambda: 0.0)
    refusals.add(refusal())
    refusals.take_due()
    refusals.add(refusal())
    refusals.add(refusal())
    assert refusals.take_due() == [], "said a moment ago"
    assert [count for _, _, count in refusals.take_all()] == [2]
    assert refusals.take_all() == []
