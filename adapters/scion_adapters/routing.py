"""Which version answers a request: an immutable picture of the routing, and pure functions on it.

Owns the meaning of the model names `chat`, `chat:7` and `chat@champion`, the sticky split of a rollout, and the set of
versions that servers keep loaded. Knows nothing of HTTP or vLLM; only the loaders at the end read the database.
"""

from __future__ import annotations

import hmac
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from types import MappingProxyType

import sqlalchemy as sa

from scion_adapters.aliases import EVALUATION_PREFIX
from scion_adapters.database import Database
from scion_adapters.errors import NotFoundError, UnavailableError
from scion_adapters.events import routing_revision
from scion_adapters.records import (
    BASE_NUMBER,
    CHALLENGER,
    CHAMPION,
    PREVIOUS,
    RolloutState,
    VersionRef,
    VersionState,
    is_step_line,
)
from scion_adapters.tables import adapters, aliases, rollouts, versions

_BUCKETS = 2.0**-53  # 53 bits of the hash fit a float exactly, so that a bucket is always < 1


@dataclass(frozen=True, slots=True)
class ServedVersion:
    """A version that can be asked: accepted, or a candidate under evaluation."""

    number: int
    lora_id: int
    digest: str
    state: VersionState
    evaluation_key: str


@dataclass(frozen=True, slots=True)
class Assignment:
    """What answers a request. `lora_id` None is the base. `rollout_id` is set when the version was drawn at random."""

    ref: VersionRef
    lora_id: int | None
    probability: float
    rollout_id: str | None


@dataclass(frozen=True, slots=True)
class AdapterRouting:
    """One adapter's routing. `weight` is the challenger's share of subjects, 0..1; 0 while servers still load it."""

    adapter: str
    champion: int
    challenger: int | None
    previous: int | None
    weight: float
    rollout_id: str | None
    aliases: Mapping[str, int]
    versions: Mapping[int, ServedVersion]
    evaluated: frozenset[int] = frozenset()  # versions that the gates ask now

    def wanted(self) -> frozenset[int]:
        """The LoRA ids that every server keeps loaded for this adapter."""
        numbers = {self.champion, self.challenger, self.previous, *self.aliases.values(), *self.evaluated}
        numbers |= {v.number for v in self.versions.values() if v.state is VersionState.CANDIDATE}
        return frozenset(self.versions[n].lora_id for n in numbers if n is not None and n in self.versions)


@dataclass(frozen=True, slots=True)
class Routing:
    """All adapters at one routing revision. What a request needs is worked out here once, not per request."""

    revision: int
    adapters: Mapping[str, AdapterRouting]
    wanted: frozenset[int] = field(init=False, repr=False, compare=False)
    _lines: Mapping[str, _Line] = field(init=False, repr=False, compare=False)
    _exact: Mapping[str, _Exact] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        exact = {name: e for line in self.adapters.values() for name, e in _exact_names(line).items()}
        routed = {name: _line(line) for name, line in self.adapters.items() if not is_step_line(name)}
        per_adapter = [line.wanted() for line in self.adapters.values()]
        object.__setattr__(self, "wanted", frozenset().union(*per_adapter))
        object.__setattr__(self, "_lines", routed)
        object.__setattr__(self, "_exact", exact)


def wanted(routing: Routing) -> frozenset[int]:
    """The LoRA ids that every server keeps loaded: champions, challengers, previous, aliases, evaluated candidates."""
    return routing.wanted


def bucket(rollout_id: str, subject: str) -> float:
    """Where `subject` stands in [0, 1) for this rollout: the challenger gets it when the weight is above that.

    A subject keeps its place for the whole rollout, so raising the weight moves only the added slice; another rollout
    draws anew.
    """
    digest = blake2b(f"{rollout_id}\0{subject}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) * _BUCKETS


def assign(
    routing: Routing,
    model: str,
    subject: str,
    resident: Collection[int],
    evaluation_key: str | None = None,
) -> Assignment | None:
    """The version that answers a request for `model`, or None when the name is not ours.

    `resident` holds the LoRA ids that this process has loaded (a set: it is asked on every request). A challenger that
    is not loaded here leaves its share to the champion, a champion that is not loaded leaves its own to `previous`.
    Raises NotFoundError for an unknown version or alias of an adapter of ours, a version that is not kept loaded, and a
    candidate without its evaluation key; UnavailableError (try again) when what was asked for is still being loaded.
    """
    line = routing._lines.get(model)
    if line is not None:
        weight = 0.0
        assignment = line.to_champion
        if line.split is not None and line.to_challenger.lora_id in resident:
            weight = line.weight
            if bucket(line.split, subject) < weight:
                return line.to_challenger
            assignment = line.to_rest
        if line.champion_id is None or line.champion_id in resident:
            return assignment
        return _fall_back(routing.adapters[model], weight, resident)
    found = routing._exact.get(model)
    if found is None and model.partition(":")[0].partition("@")[0] not in routing.adapters:
        return None
    if found is None or not _may_ask(found, evaluation_key):
        raise _unknown(routing, model, resident)
    lora_id = found.assignment.lora_id
    if lora_id is None or lora_id in resident:
        return found.assignment
    if lora_id in routing.wanted:
        raise UnavailableError(f"{model} is still being loaded by this server; try again in a moment")
    raise _unknown(routing, model, resident)


# --- what is worked out once per revision -----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Line:
    """Routed traffic of one adapter. `split` is the rollout's id, or None when there is nothing to draw."""

    split: str | None
    weight: float
    champion_id: int | None
    to_champion: Assignment  # nothing is drawn
    to_challenger: Assignment
    to_rest: Assignment  # the champion's share while the challenger has its own


@dataclass(frozen=True, slots=True)
class _Exact:
    """An exact version or an alias. `evaluation_key` is set for candidates: who asks must present it."""

    assignment: Assignment
    evaluation_key: str | None


def _line(line: AdapterRouting) -> _Line:
    challenger = line.versions.get(line.challenger) if line.challenger is not None else None
    if challenger is not None and challenger.state is not VersionState.ACCEPTED:
        challenger = None
    champion = line.versions.get(line.champion)
    # A champion that may not be served (rejected, gone) is never resident: -1 falls back like one that is not loaded.
    champion_id = None if line.champion == BASE_NUMBER else (champion.lora_id if champion else -1)
    champion_ref = VersionRef(line.adapter, line.champion)
    to_champion = Assignment(champion_ref, champion_id, 1.0, None)
    if challenger is None or line.rollout_id is None or line.weight <= 0.0:
        return _Line(None, 0.0, champion_id, to_champion, to_champion, to_champion)
    return _Line(
        split=line.rollout_id,
        weight=line.weight,
        champion_id=champion_id,
        to_champion=to_champion,
        to_challenger=Assignment(
            VersionRef(line.adapter, challenger.number), challenger.lora_id, line.weight, line.rollout_id
        ),
        to_rest=Assignment(champion_ref, champion_id, 1.0 - line.weight, line.rollout_id),
    )


def _exact_names(line: AdapterRouting) -> dict[str, _Exact]:
    def exact(number: int) -> _Exact | None:
        if number == BASE_NUMBER:
            return _Exact(Assignment(VersionRef(line.adapter, BASE_NUMBER), None, 1.0, None), None)
        served = line.versions.get(number)
        if served is None:
            return None
        key = served.evaluation_key if served.state is VersionState.CANDIDATE else None
        return _Exact(Assignment(VersionRef(line.adapter, number), served.lora_id, 1.0, None), key)

    numbers = {f"{line.adapter}:{number}": number for number in (BASE_NUMBER, *line.versions)}
    names = {f"{line.adapter}@{CHAMPION}": line.champion}
    names |= {f"{line.adapter}@{alias}": number for alias, number in line.aliases.items()}
    if line.challenger is not None:
        names[f"{line.adapter}@{CHALLENGER}"] = line.challenger
    found = {name: exact(number) for name, number in {**numbers, **names}.items()}
    return {name: entry for name, entry in found.items() if entry is not None}


# --- the rare ways ----------------------------------------------------------------------------------------------------


def _fall_back(line: AdapterRouting, weight: float, resident: Collection[int]) -> Assignment:
    """The champion is not loaded here: its share goes to `previous`, and is no part of the experiment."""
    previous = line.versions.get(line.previous) if line.previous else None
    if line.previous == BASE_NUMBER or (previous is not None and previous.lora_id in resident):
        lora_id = previous.lora_id if previous is not None else None
        return Assignment(VersionRef(line.adapter, line.previous or BASE_NUMBER), lora_id, 1.0 - weight, None)
    raise UnavailableError(
        f"{line.adapter}: its champion {line.adapter}:{line.champion} is not loaded by this server yet; "
        "try again in a moment"
    )


def _unknown(routing: Routing, model: str, resident: Collection[int]) -> NotFoundError:
    """The refusal of a name of ours; it says what can be asked."""
    name = model.partition(":")[0].partition("@")[0]
    line = routing.adapters[name]
    accepted = [v for v in line.versions.values() if v.state is VersionState.ACCEPTED]
    loaded = [f"{name}:{number}" for number in (0, *sorted(v.number for v in accepted if v.lora_id in resident))]
    known = [f"{name}@{alias}" for alias in sorted({CHAMPION, *line.aliases})]
    return NotFoundError(
        f"{model[:80]} is not served; ask {name}, a loaded version ({', '.join(loaded)}) "
        f"or an alias ({', '.join(known)})"
    )


def _may_ask(found: _Exact, given: str | None) -> bool:
    expected = found.evaluation_key
    if expected is None:
        return True
    return given is not None and hmac.compare_digest(expected.encode(), given.encode("utf-8", "surrogatepass"))


# --- reading it -------------------------------------------------------------------------------------------------------


def load_routing(database: Database) -> Routing:
    """Read the present routing in one transaction."""
    with database.read() as connection:
        return routing_in(connection)


def routing_in(connection: sa.Connection) -> Routing:
    """`load_routing` in the caller's transaction."""
    served_states = [VersionState.ACCEPTED, VersionState.CANDIDATE]
    active_states = [state for state in RolloutState if state.is_active]
    served_columns = [versions.c[name] for name in ("adapter", *ServedVersion.__dataclass_fields__)]
    revision = routing_revision(connection)
    names = connection.execute(sa.select(adapters.c.name)).scalars().all()
    alias_rows = connection.execute(sa.select(aliases)).mappings().all()
    query = sa.select(*served_columns).where(versions.c.state.in_(served_states))
    version_rows = connection.execute(query).mappings().all()
    running = sa.select(rollouts).where(rollouts.c.state.in_(active_states))
    rollout_rows = {row["adapter"]: row for row in connection.execute(running).mappings()}
    lines = {}
    for name in names:
        numbers = {row["alias"]: int(row["number"]) for row in alias_rows if row["adapter"] == name}
        evaluated = frozenset(n for alias, n in numbers.items() if alias.startswith(EVALUATION_PREFIX))
        served = [_served(row) for row in version_rows if row["adapter"] == name]
        rollout = rollout_rows.get(name)
        lines[name] = AdapterRouting(
            adapter=name,
            champion=numbers.get(CHAMPION, BASE_NUMBER),
            challenger=rollout["number"] if rollout else None,
            previous=numbers.get(PREVIOUS),
            weight=float(rollout["steps"][rollout["step"]]) if rollout and rollout["step"] >= 0 else 0.0,
            rollout_id=rollout["id"] if rollout else None,
            aliases=MappingProxyType({a: n for a, n in numbers.items() if not a.startswith(EVALUATION_PREFIX)}),
            versions=MappingProxyType(
                {v.number: v for v in served if v.state is VersionState.ACCEPTED or v.number in evaluated}
            ),
            evaluated=evaluated,
        )
    return Routing(revision, MappingProxyType(lines))


def read_revision(database: Database) -> int:
    """The routing revision in the database: one small read, made to be asked several times a second."""
    with database.read() as connection:
        return routing_revision(connection)


def _served(row: sa.RowMapping) -> ServedVersion:
    return ServedVersion(
        row["number"], row["lora_id"], row["digest"], VersionState(row["state"]), row["evaluation_key"]
    )
