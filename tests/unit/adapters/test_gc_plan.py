"""Which files may go: nothing that can be reached does."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scion_adapters.gc import Fate, plan_gc
from scion_adapters.records import Replica, Version, VersionRef, VersionState

GONE = VersionState.RETIRED
REPLICA = Replica("server-1", "host", 1, "http://x", 0.0, 0.0, 4, 8, 16, frozenset(), {}, {}, 1, "sha256:base")


def version(number: int = 1, state: VersionState = GONE, digest: str | None = None) -> Version:
    return Version(
        adapter="chat",
        number=number,
        lora_id=10 + number,
        digest=digest or f"sha256:{number}",
        state=state,
        parent=0,
        base_fingerprint="sha256:base",
        rank=4,
        size_bytes=1,
        evaluation_key="key",
        created_at=0.0,
        created_by="test",
    )


def plan(versions: list[Version], **changed: Any) -> list[Fate]:
    options: dict[str, Any] = {
        "aliases": {},
        "replicas": [],
        "champion_until": {},
        "young": set(),
        "now": 1000.0,
        "rollback_window_s": 100.0,
    }
    return plan_gc(versions, **(options | changed))


@pytest.mark.parametrize(
    ("versions", "options", "reason"),
    [
        ([version()], {}, None),
        ([version(state=VersionState.REJECTED)], {}, None),
        ([version(state=VersionState.CANDIDATE)], {}, "it is candidate"),
        ([version(state=VersionState.ACCEPTED)], {}, "it is accepted"),
        ([version(state=VersionState.QUARANTINED)], {}, "it is quarantined"),
        ([version()], {"aliases": {"chat": {"previous": 1}}}, "chat@previous points at it"),
        ([version()], {"aliases": {"other": {"previous": 1}}}, None),
        ([version()], {"replicas": [replace(REPLICA, loaded=frozenset({11}))]}, "server-1 holds it"),
        ([version()], {"replicas": [replace(REPLICA, in_flight={11: 2})]}, "server-1 holds it"),
        ([version()], {"replicas": [replace(REPLICA, in_flight={11: 0}, loaded=frozenset({12}))]}, None),
        ([version()], {"champion_until": {VersionRef("chat", 1): 901.0}}, "it was champion within the rollback window"),
        ([version()], {"champion_until": {VersionRef("chat", 1): 900.0}}, None),
        ([version()], {"young": {"sha256:1"}}, "it was published just now"),
        (
            [version(), version(2, VersionState.ACCEPTED, "sha256:1")],
            {},
            "chat:2 has the same files",
        ),
    ],
)
def test_files_are_kept_for_a_reason(versions: list[Version], options: dict[str, Any], reason: str | None) -> None:
    assert plan(versions, **options)[0].kept_for == reason


@given(
    states=st.lists(st.sampled_from(VersionState), min_size=1, max_size=6),
    shared=st.lists(st.integers(0, 2), min_size=6, max_size=6),
    aliased=st.sets(st.integers(1, 6)),
    loaded=st.frozensets(st.integers(11, 16)),
    flying=st.sets(st.integers(11, 16)),
)
def test_no_reachable_digest_ever_goes(
    states: list[VersionState], shared: list[int], aliased: set[int], loaded: frozenset[int], flying: set[int]
) -> None:
    versions = [version(n + 1, state, f"sha256:{shared[n]}") for n, state in enumerate(states)]
    aliases = {"chat": {f"a{number}": number for number in aliased}}
    replica = replace(REPLICA, loaded=loaded, in_flight=dict.fromkeys(flying, 1))
    fates = plan(versions, aliases=aliases, replicas=[replica])
    reachable = {
        v.digest
        for v in versions
        if v.number in aliased
        or v.lora_id in loaded | flying
        or v.state in (VersionState.ACCEPTED, VersionState.CANDIDATE)
    }
    assert not {fate.version.digest for fate in fates if fate.kept_for is None} & reachable
