"""Scopes and the key ring, without a server: every route has a decided scope, and nothing malformed gets in."""

from __future__ import annotations

from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import Headers

from scion_adapters.errors import InvalidInputError
from scion_adapters.keys import EMPTY_RING, ApiKey, KeyRing, Scope, key_id_of
from vllm_scion.authority import Gatekeeper, Refusal, check_access, required_scope
from vllm_scion.refusals import MAX_KINDS, Refusals

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


def refusal(client: str = "10.0.0.1", path: str = "/v1/models") -> Refusal:
    return Refusal("missing", "GET", path, client, None)


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
