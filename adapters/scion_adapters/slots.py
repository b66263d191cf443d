"""Does another version fit into the servers? vLLM holds `max_cpu_loras` adapters, and `max_loras` of them in one batch.

What does not fit is not refused by vLLM: it evicts another adapter, or lets requests wait without ageing. So it is
refused here, before a rollout starts. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

from scion_adapters.errors import ConflictError
from scion_adapters.records import BASE_NUMBER, Replica, VersionRef, VersionState, is_step_line
from scion_adapters.routing import Routing

RESERVED_FOR_CANDIDATE = 1
"""The next candidate must be loadable for its gates while a rollout runs."""
RESERVED_FOR_DRAINING = 1
"""A version that is being left keeps its place until its last request has ended."""


def check_slots(routing: Routing, challenger: VersionRef, lora_id: int, live: Sequence[Replica]) -> None:
    """Raise ConflictError, with the numbers, when the smallest live server could not hold `challenger` as well.

    Nothing is known while no server is live; the controller then waits until those that come have loaded it.
    """
    if not live:
        return
    loaded = routing.wanted | {lora_id}
    lines = [line for line in routing.adapters.values() if not is_step_line(line.adapter)]
    evaluated = [v for line in lines for v in line.versions.values() if _is_candidate(v.state)]
    reserved = RESERVED_FOR_DRAINING + (0 if evaluated else RESERVED_FOR_CANDIDATE)
    smallest = min(live, key=lambda replica: replica.max_cpu_loras)
    if len(loaded) + reserved > smallest.max_cpu_loras:
        raise ConflictError(
            f"{challenger} does not fit: servers would hold {len(loaded)} versions ({_names(routing, challenger)}) and "
            f"keep {reserved} free for a version that drains and a candidate, {len(loaded) + reserved} in all, but "
            f"{smallest.id} has "
            f"{smallest.max_cpu_loras} (server.max_cpu_loras): raise it and restart, or remove an alias"
        )
    serving = {(line.adapter, n) for line in lines for n in (line.champion, line.challenger) if n}
    serving.add((challenger.adapter, challenger.number))
    narrowest = min(live, key=lambda replica: replica.max_loras)
    if len(serving) > narrowest.max_loras:
        raise ConflictError(
            f"{challenger} does not fit: {len(serving)} versions would serve users at once, but a batch of "
            f"{narrowest.id} takes {narrowest.max_loras} (server.max_loras): raise it and restart, or wait until "
            "another rollout has ended"
        )


def _is_candidate(state: VersionState) -> bool:
    return state is VersionState.CANDIDATE


def _names(routing: Routing, challenger: VersionRef) -> str:
    names = {str(challenger)}
    for line in routing.adapters.values():
        held = line.wanted()
        names |= {f"{line.adapter}:{v.number}" for v in line.versions.values() if v.lora_id in held}
    return ", ".join(sorted(names - {f"{name}:{BASE_NUMBER}" for name in routing.adapters}))
