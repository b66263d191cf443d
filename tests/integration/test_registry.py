"""The registry on real databases: numbers, ids, states, aliases, and what two processes at once may not do."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import sqlalchemy as sa

from scion_adapters import registry as registry_module
from scion_adapters import tables
from scion_adapters.aliases import set_alias_in
from scion_adapters.artifacts import ArtifactStore
from scion_adapters.database import Database
from scion_adapters.errors import ConflictError, InvalidInputError, NotFoundError, RejectedError, UnavailableError
from scion_adapters.events import list_events
from scion_adapters.fingerprint import read_base
from scion_adapters.records import CHALLENGER, CHAMPION, PREVIOUS, Version, VersionRef, VersionState
from scion_adapters.registry import Registry
from scion_adapters.rollouts import Rollouts
from tests.helpers.adapters import LIMITS, make_adapter, make_base
from tests.helpers.registry_world import RegistryWorld


@pytest.fixture
def world(database: Database, tmp_path: Path) -> RegistryWorld:
    registry = Registry(database, ArtifactStore(tmp_path / "store"), clock=lambda: 100.0)
    registry.ensure_adapter("chat")
    return RegistryWorld(registry, read_base(make_base(tmp_path / "base")), tmp_path)


def test_a_published_version_is_a_candidate_with_its_history(world: RegistryWorld) -> None:
    first = world.publish(run_id="run-1")
    second = world.publish(parent=1)

    assert (first.number, first.state, first.parent, first.run_id) == (1, VersionState.CANDIDATE, 0, "run-1")
    assert (second.number, second.parent) == (2, 1)
    assert first.base_fingerprint == world.base.fingerprint
    assert len({first.evaluation_key, second.evaluation_key, ""}) == 3
    assert world.registry.store.path(first.digest).name == first.digest.removeprefix("sha256:")
    assert world.registry.versions("chat") == [first, second]
    (event, _) = list_events(world.registry.database)
    assert (event.kind, event.number, event.actor, event.reason, event.at) == (
        "version.published",
        1,
        "test",
        "because",
        100.0,
    )


def test_numbers_count_per_adapter_and_lora_ids_over_all(world: RegistryWorld) -> None:
    versions = [world.publish("chat"), world.publish("code"), world.publish("chat")]
    assert [(version.adapter, version.number) for version in versions] == [("chat", 1), ("code", 1), ("chat", 2)]
    assert [version.lora_id for version in versions] == [1, 2, 3]
    assert world.registry.adapters() == ["chat", "code"]


def test_a_run_publishes_once(world: RegistryWorld) -> None:
    first = world.publish(run_id="run-1")
    assert world.publish(run_id="run-1") == first  # a resumed run
    assert world.publish(run_id="run-2").number == 2  # and no number was spent
    assert world.kinds().count("version.published") == 2


def test_a_run_that_two_processes_resume_publishes_once(world: RegistryWorld) -> None:
    directories = [world.adapter_directory() for _ in range(4)]
    barrier = threading.Barrier(4)

    def publish(directory: Path) -> Version:
        barrier.wait(10)
        return world.registry.publish(
            "chat", directory, parent=0, base=world.base, limits=LIMITS, actor="test", run_id="run-1"
        )

    with ThreadPoolExecutor(4) as pool:
        versions = list(pool.map(publish, directories))
    assert len({version.lora_id for version in versions}) == 1
    assert len(world.registry.versions("chat")) == 1


def test_many_processes_never_share_a_number_or_an_id(world: RegistryWorld) -> None:
    with ThreadPoolExecutor(4) as pool:
        versions = list(pool.map(lambda _: world.publish(), range(12)))
    assert sorted(version.number for version in versions) == list(range(1, 13))
    assert len({version.lora_id for version in versions}) == 12


def test_a_name_that_no_column_holds_is_refused_with_an_event(world: RegistryWorld, tmp_path: Path) -> None:
    good = make_adapter(tmp_path / "good", world.base)
    for name in ("\0", "\ud800", "x" * 10_000):
        with pytest.raises(RejectedError) as caught:
            world.registry.publish(name, good, parent=0, base=world.base, limits=LIMITS, actor="test")
        event = list_events(world.registry.database, newest=True)[-1]
        assert (event.kind, event.adapter, event.data["check"]) == ("version.refused", None, "invalid_name")
        assert event.reason == str(caught.value)


def test_whatever_somebody_gives_as_a_reason_for_publishing_can_be_recorded(world: RegistryWorld) -> None:
    world.registry.publish(
        "chat",
        world.adapter_directory(),
        parent=0,
        base=world.base,
        limits=LIMITS,
        actor="test",
        reason="a NUL: \0, half a letter: \ud800, an é",
    )
    event = list_events(world.registry.database, newest=True)[-1]
    assert event.reason == "a NUL: \\0, half a letter: \\ud800, an é"


def test_whatever_a_decision_quotes_can_be_recorded(world: RegistryWorld) -> None:
    odd, stored = "says \0 and \ud800", "says \\0 and \\ud800"
    first, second = world.accepted(), world.publish()
    assert world.registry.reject(second.ref, actor="gates", reason=odd).reason == stored
    rollouts = Rollouts(world.registry.database)
    rollouts.start(first.ref, steps=[1.0], actor="ann", reason=odd)
    assert stored in rollouts.pause("chat", actor="ann", reason=odd).message
    assert stored in rollouts.abort("chat", actor="ann", reason=odd).message
    assert {change.reason for change in world.registry.alias_history("chat", "challenger")} == {stored}


def test_an_adapter_cannot_be_called_what_the_base_is_called(database: Database, tmp_path: Path) -> None:
    registry = Registry(database, ArtifactStore(tmp_path / "store"), base_names=["Base-7b"])
    with pytest.raises(RejectedError, match=r"base\.served_name"):
        registry.ensure_adapter("base-7b")
    assert registry.adapters() == []


def test_a_refused_adapter_leaves_an_event_and_nothing_else(world: RegistryWorld, tmp_path: Path) -> None:
    bad = make_adapter(tmp_path / "bad", world.base, config={"use_dora": True})
    with pytest.raises(RejectedError) as caught:
        world.registry.publish("chat", bad, parent=0, base=world.base, limits=LIMITS, actor="test", run_id="run-1")

    assert caught.value.reason == "unsupported_config"
    assert world.registry.versions("chat") == []
    (event,) = list_events(world.registry.database)
    assert (event.kind, event.data["check"], event.data["run_id"]) == ("version.refused", "unsupported_config", "run-1")
    assert "use_dora" in event.reason
    assert not list((tmp_path / "store").glob("versions/*"))
    assert not list((tmp_path / "store/tmp").iterdir())


def test_the_parent_must_exist(world: RegistryWorld) -> None:
    with pytest.raises(NotFoundError, match="chat:3 does not exist"):
        world.publish(parent=3)


# what is asked for -> the version it names
RESOLVED = [
    ("chat", 2),  # the champion
    ("chat@champion", 2),  # the same, spelled out
    ("chat:1", 1),  # exactly that version
    ("chat:0", 0),  # the base
    ("chat@good", 1),  # a user's alias
]


@pytest.mark.parametrize(("text", "number"), RESOLVED)
def test_names_resolve_to_versions(world: RegistryWorld, text: str, number: int) -> None:
    world.accepted()
    world.accepted()
    world.set_traffic(CHAMPION, 2)
    world.registry.set_alias("chat", "good", 1, actor="test")
    assert world.registry.resolve(text) == VersionRef("chat", number)


def test_without_a_champion_the_base_answers(world: RegistryWorld) -> None:
    assert world.registry.resolve("chat") == VersionRef("chat", 0)


# what is asked for, the error, and a piece of its message that helps
UNRESOLVED = [
    ("chat:9", NotFoundError, "has 1 versions"),  # no such version
    ("nope", NotFoundError, "there are chat"),  # no such adapter: says which there are
    ("nope:0", NotFoundError, "no adapter"),  # also for its base
    ("chat@nope", NotFoundError, "no alias 'nope'"),  # no such alias
    ("chat:x", InvalidInputError, "expected NAME:NUMBER"),  # not a number
    ("../chat", InvalidInputError, "adapter name"),  # not a name
]


@pytest.mark.parametrize(("text", "error", "message"), UNRESOLVED)
def test_unknown_names_say_what_there_is(world: RegistryWorld, text: str, error: type[Exception], message: str) -> None:
    world.publish()
    with pytest.raises(error, match=message):
        world.registry.resolve(text)


def test_accepting_changes_the_routing_once(world: RegistryWorld) -> None:
    candidate = world.publish()
    before = world.revision()
    accepted = world.registry.accept(candidate.ref, actor="gates", reason="passed", metrics={"margin": 0.5})
    assert (accepted.state, accepted.metrics["margin"]) == (VersionState.ACCEPTED, 0.5)
    assert world.revision() == before + 1
    world.registry.accept(candidate.ref, actor="gates", reason="again")
    assert world.revision() == before + 1
    assert world.kinds() == ["version.published", "version.accepted"]


def test_a_rejected_version_stays_rejected(world: RegistryWorld) -> None:
    candidate = world.publish()
    rejected = world.registry.reject(candidate.ref, actor="gates", reason="forgets")
    assert (rejected.state, rejected.reason) == (VersionState.REJECTED, "forgets")
    assert world.registry.reject(candidate.ref, actor="gates", reason="again").reason == "forgets"
    with pytest.raises(ConflictError, match="only a candidate"):
        world.registry.accept(candidate.ref, actor="me", reason="changed my mind")
    with pytest.raises(ConflictError, match="is rejected"):
        world.registry.set_alias("chat", "mine", 1, actor="me")
    with pytest.raises(ConflictError, match="is rejected"):
        world.registry.request_evaluation(candidate.ref)


@pytest.mark.parametrize("alias", [CHAMPION, CHALLENGER])
def test_a_version_that_serves_cannot_be_rejected(world: RegistryWorld, alias: str) -> None:
    version = world.accepted()
    world.set_traffic(alias, version.number)
    with pytest.raises(ConflictError, match=f"serves users as {alias}"):
        world.registry.reject(version.ref, actor="me", reason="bad")
    assert world.registry.version(version.ref).state is VersionState.ACCEPTED


def test_rejecting_takes_every_other_alias_away(world: RegistryWorld) -> None:
    version = world.accepted()
    world.set_traffic(PREVIOUS, 1)
    world.registry.set_alias("chat", "good", 1, actor="me")
    world.registry.request_evaluation(version.ref)
    world.registry.reject(version.ref, actor="me", reason="bad")
    assert world.registry.aliases("chat") == {}
    removed = [change.alias for change in world.registry.alias_history("chat") if change.number is None]
    assert sorted(removed) == ["candidate-1", "good", "previous"]


def test_aliases_keep_their_history(world: RegistryWorld) -> None:
    world.accepted()
    world.accepted()
    for number in (1, 2, 2, 1):  # the second 2 changes nothing
        world.registry.set_alias("chat", "good", number, actor="me", reason=f"to {number}")
    world.registry.remove_alias("chat", "good", actor="me", reason="done")
    history = world.registry.alias_history("chat", "good")
    assert [(change.previous, change.number) for change in history] == [(None, 1), (1, 2), (2, 1), (1, None)]
    assert [change.reason for change in history] == ["to 1", "to 2", "to 1", "done"]
    assert world.kinds()[-4:] == ["alias.set", "alias.set", "alias.set", "alias.removed"]
    with pytest.raises(NotFoundError, match="no alias 'good'"):
        world.registry.remove_alias("chat", "good", actor="me")


# alias, number, error, message
REFUSED_ALIASES = [
    ("good", 2, ConflictError, "is candidate: expected accepted"),  # has not passed the gates
    ("good", 9, NotFoundError, "chat:9 does not exist"),  # no such version
    (CHAMPION, 1, InvalidInputError, "scion rollout"),  # traffic is moved by rollouts only
    (CHALLENGER, 1, InvalidInputError, "scion rollout"),  # also the challenger
    (PREVIOUS, 1, InvalidInputError, "scion rollout"),  # and what a rollback goes to
    ("candidate-1", 1, InvalidInputError, "reserved"),  # the gates' own
    ("Good!", 1, InvalidInputError, "^alias 'Good!'"),  # not a name
]


@pytest.mark.parametrize(("alias", "number", "error", "message"), REFUSED_ALIASES)
def test_aliases_that_are_refused(
    world: RegistryWorld, alias: str, number: int, error: type[Exception], message: str
) -> None:
    world.accepted()
    world.publish()
    with pytest.raises(error, match=message):
        world.registry.set_alias("chat", alias, number, actor="me")
    assert world.registry.aliases("chat") == {}


def test_an_alias_may_name_the_base(world: RegistryWorld) -> None:
    world.registry.set_alias("chat", "plain", 0, actor="me")
    assert world.registry.resolve("chat@plain") == VersionRef("chat", 0)


def test_not_even_a_rollout_can_route_to_a_candidate(world: RegistryWorld) -> None:
    world.publish()
    with pytest.raises(ConflictError, match="is candidate"):
        world.set_traffic(CHALLENGER, 1)


def test_an_evaluation_is_a_reserved_alias(world: RegistryWorld) -> None:
    candidate = world.publish()
    before = world.revision()
    world.registry.request_evaluation(candidate.ref)
    assert world.registry.aliases("chat") == {"candidate-1": 1}
    world.registry.finish_evaluation(candidate.ref)
    world.registry.finish_evaluation(candidate.ref)  # nothing left to do
    assert world.registry.aliases("chat") == {}
    assert world.revision() == before + 2


def test_an_alias_that_several_set_at_once_keeps_one_history(world: RegistryWorld) -> None:
    world.accepted()
    world.accepted()
    barrier = threading.Barrier(4)

    def move(number: int) -> None:
        barrier.wait(10)
        world.registry.set_alias("chat", "good", number, actor="me")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(move, (1, 2, 1, 2)))
    history = world.registry.alias_history("chat", "good")
    assert [change.previous for change in history] == [None, *(change.number for change in history[:-1])]
    assert history[-1].number == world.registry.aliases("chat")["good"]


def test_a_version_is_never_rejected_and_pointed_at(world: RegistryWorld) -> None:
    for _ in range(5):
        version = world.accepted()
        barrier = threading.Barrier(2)

        def reject(ref: VersionRef = version.ref, barrier: threading.Barrier = barrier) -> None:
            barrier.wait(10)
            world.registry.reject(ref, actor="me", reason="bad")

        def point(ref: VersionRef = version.ref, barrier: threading.Barrier = barrier) -> None:
            barrier.wait(10)
            with suppress(ConflictError):  # came second
                world.registry.set_alias("chat", "good", ref.number, actor="me")

        with ThreadPoolExecutor(2) as pool:
            for future in (pool.submit(reject), pool.submit(point)):
                future.result(30)
        assert world.registry.version(version.ref).state is VersionState.REJECTED
        assert world.registry.aliases("chat") == {}


def test_a_publication_that_broke_off_can_be_repeated(world: RegistryWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:  # the artifact is stored, and then the database is away
        patch.setattr(registry_module, "insert_version", unavailable)
        with pytest.raises(UnavailableError):
            world.publish(run_id="run-1")
    assert world.registry.versions("chat") == []
    assert world.publish(run_id="run-1").number == 1


def unavailable(*_: object, **__: object) -> None:
    raise UnavailableError("the database does not answer")


def test_the_base_is_not_a_version(world: RegistryWorld) -> None:
    with pytest.raises(InvalidInputError, match="the base itself"):
        world.registry.reject(VersionRef("chat", 0), actor="me", reason="no")


def test_a_failed_transaction_leaves_no_trace(world: RegistryWorld) -> None:
    before = world.revision()

    def set_and_die() -> None:
        with world.registry.database.write() as connection:
            set_alias_in(connection, "chat", "good", 0, clock_value=1.0, actor="me")
            raise RuntimeError("the process dies here")

    with pytest.raises(RuntimeError, match="dies here"):
        set_and_die()
    assert world.registry.aliases("chat") == {}
    assert (world.kinds(), world.revision()) == ([], before)
    with world.registry.database.read() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(tables.alias_history)).scalar() == 0
