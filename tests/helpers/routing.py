"""Routings for tests, in one line: no database needed."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from scion_adapters.records import VersionState
from scion_adapters.routing import AdapterRouting, Routing, ServedVersion


def make_line(
    adapter: str = "chat",
    *,
    accepted: Mapping[int, int] | None = None,
    candidates: Mapping[int, int] | None = None,
    champion: int = 0,
    challenger: int | None = None,
    previous: int | None = None,
    weight: float = 0.0,
    aliases: Mapping[str, int] | None = None,
) -> AdapterRouting:
    """One adapter; `accepted` and `candidates` map numbers to LoRA ids. The evaluation key of N is `key-N`."""
    versions = {}
    for numbers, state in ((accepted or {}, VersionState.ACCEPTED), (candidates or {}, VersionState.CANDIDATE)):
        for number, lora_id in numbers.items():
            digest = f"sha256:{adapter}-{number}"
            versions[number] = ServedVersion(number, lora_id, digest, state, f"key-{number}")
    return AdapterRouting(
        adapter=adapter,
        champion=champion,
        challenger=challenger,
        previous=previous,
        weight=weight,
        rollout_id=f"rollout-{challenger}" if challenger is not None else None,
        aliases=MappingProxyType(dict(aliases or {})),
        versions=MappingProxyType(versions),
    )


def make_routing(*lines: AdapterRouting, revision: int = 1) -> Routing:
    return Routing(revision, MappingProxyType({line.adapter: line for line in lines}))
