"""Rollouts as people command them, on both databases: what each verb changes, what it records, what it refuses."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from scion_adapters import controller, transitions
from scion_adapters.database import Database
from scion_adapters.errors import ConflictError, InvalidInputError, NotFoundError
from scion_adapters.events import list_events
from scion_adapters.records import Rollout, RolloutState, VersionRef, VersionState
from scion_adapters.retirement import quarantine
from scion_adapters.rollouts import Rollouts
from scion_adapters.routing import load_routing, read_revision
from scion_adapters.transitions import Cause, StaleRolloutError
from tests.helpers.rollouts import START, FakeClock, add_version, event_kinds, lora_id_of, make_replica, report

CHAT_2 = VersionRef("chat", 2)
STEPS = (0.1, 0.5, 1.0)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def rollouts(database: Database, clock: FakeClock) -> Rollouts:
    """Versions 1 to 4 of chat are accepted, 5 is a candidate, 6 is rejected; the base answers."""
    for number in (1, 2, 3, 4):
        add_version(database, number)
    add_version(database, 5, state=VersionState.CANDIDATE)
    add_version(database, 6, state=VersionState.REJECTED, reason="retention: 0.61 nats lost")
    return Rollouts(database, clock, default_every_s=300.0, ttl_s=10.0)


def start(rollouts: Rollouts, number: int = 2, **kwargs: object) -> Rollout:
    return rollouts.start(VersionRef("chat", number), steps=STEPS, actor="ann", **kwargs)  # type: ignore[arg-type]


def promote_all(rollouts: Rollouts, *numbers: int) -> None:
    """Make each of `numbers` champion in turn (no server is live, so nothing is waited for)."""
    for number in numbers:
        start(rollouts, number)
        rollouts.promote("chat", actor="ann")


def aliases(database: Database) -> dict[str, int]:
    return dict(load_routing(database).adapters["chat"].aliases)


def at_step(database: Database, rollout: Rollout, step: int) -> None:
    with database.write() as connection:
        transitions.set_step(connection, rollout, step, "", Cause("controller", "", START))


# --- start ------------------------------------------------------------------------------------------------------------


def test_start_names_a_challenger_and_moves_no_traffic(database: Database, rollouts: Rollouts) -> None:
    rollout = start(rollouts, reason="better manners")
    assert (rollout.state, rollout.step, rollout.weight, rollout.stable) == (RolloutState.PROGRESSING, -1, 0.0, 0)
    assert (rollout.every_s, rollout.after_requests) == (300.0, None)
    line = load_routing(database).adapters["chat"]
    assert (line.champion, line.challenger, line.weight, line.rollout_id) == (0, 2, 0.0, rollout.id)
    assert lora_id_of("chat", 2) in line.wanted()
    assert rollouts.get(rollout.id) == rollouts.active("chat") == rollout


def test_start_tells_who_what_and_why(database: Database, rollouts: Rollouts) -> None:
    rollout = start(rollouts, after_requests=50, guard=False, reason="better manners")
    assert event_kinds(database) == ["alias.set challenger", "rollout.started"]
    event = list_events(database)[-1]
    assert (event.actor, event.reason, event.number, event.at) == ("ann", "better manners", 2, START)
    assert event.data == {
        "rollout_id": rollout.id,
        "steps": [0.1, 0.5, 1.0],
        "every_s": None,
        "after_requests": 50,
        "guard": False,
        "stable": 0,
    }


REFUSED_STARTS = [
    # number, arguments, error, message
    (99, {}, NotFoundError, "chat:99 does not exist"),
    (0, {}, InvalidInputError, "rollback chat --to 0"),  # the base is no version
    (5, {}, ConflictError, "chat:5 is candidate.*scion evaluate chat:5"),  # not through the gates yet
    (6, {}, ConflictError, r"chat:6 is rejected \(retention: 0.61 nats lost\)"),
    (2, {"every_s": 5.0, "after_requests": 5}, InvalidInputError, "either every_s or after_requests"),
    (2, {"after_requests": 0}, InvalidInputError, "at least 1"),
    (2, {"every_s": -1.0}, InvalidInputError, "every_s: -1"),
]


@pytest.mark.parametrize(("number", "arguments", "error", "says"), REFUSED_STARTS)
def test_start_refuses_and_changes_nothing(
    database: Database,
    rollouts: Rollouts,
    number: int,
    arguments: dict[str, object],
    error: type[Exception],
    says: str,
) -> None:
    before = read_revision(database)
    with pytest.raises(error, match=says):
        start(rollouts, number, **arguments)
    assert event_kinds(database) == []
    assert (read_revision(database), rollouts.list("chat")) == (before, [])


def test_start_refuses_steps_that_do_not_end_at_everybody(rollouts: Rollouts) -> None:
    with pytest.raises(InvalidInputError, match=r"does not end at 1\.0"):
        rollouts.start(CHAT_2, steps=(0.1, 0.5), actor="ann")


def test_start_refuses_an_unknown_adapter_the_champion_and_a_second_rollout(rollouts: Rollouts) -> None:
    with pytest.raises(NotFoundError, match="no adapter 'chit'"):
        rollouts.start(VersionRef("chit", 1), steps=STEPS, actor="ann")
    promote_all(rollouts, 1)
    with pytest.raises(ConflictError, match="chat:1 is the champion already"):
        start(rollouts, 1)
    running = start(rollouts, 2)
    with pytest.raises(ConflictError, match=rf"{running.id} of chat:2.*promote.abort chat"):
        start(rollouts, 3)


def test_start_refuses_what_does_not_fit_into_a_live_server(database: Database, rollouts: Rollouts) -> None:
    report(database, make_replica("tiny:1", max_cpu_loras=1))
    with pytest.raises(ConflictError, match=r"chat:2 does not fit.*tiny:1 has 1"):
        start(rollouts)


def test_a_server_that_is_silent_for_too_long_does_not_count(
    database: Database, rollouts: Rollouts, clock: FakeClock
) -> None:
    report(database, make_replica("tiny:1", max_cpu_loras=1))
    clock.advance(10.1)
    assert start(rollouts).number == 2


def test_each_adapter_has_its_own_rollout(database: Database, rollouts: Rollouts) -> None:
    add_version(database, 1, adapter="code")
    start(rollouts)
    other = rollouts.start(VersionRef("code", 1), steps=STEPS, actor="ann")
    assert rollouts.active("code") == other
    rollouts.abort("chat", actor="ann")
    assert rollouts.active("code") == other


def test_of_two_people_who_start_at_once_one_wins(database: Database, rollouts: Rollouts) -> None:
    outcomes: list[str] = []
    ready = threading.Barrier(4)

    def begin(number: int) -> None:
        ready.wait(10)
        try:
            start(rollouts, number)
            outcomes.append("started")
        except ConflictError:
            outcomes.append("refused")

    threads = [threading.Thread(target=begin, args=(number,)) for number in (1, 2, 3, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(outcomes) == ["refused", "refused", "refused", "started"]
    assert event_kinds(database) == ["alias.set challenger", "rollout.started"]


# --- pause, resume ----------------------------------------------------------------------------------------------------


def test_pause_keeps_the_share_and_resume_begins_the_step_anew(
    database: Database, rollouts: Rollouts, clock: FakeClock
) -> None:
    at_step(database, start(rollouts), 1)
    clock.advance(100)
    paused = rollouts.pause("chat", actor="ben", reason="lunch")
    assert (paused.state, paused.paused_by, paused.weight) == (RolloutState.PAUSED, "ben", 0.5)
    assert paused.message == "paused at 50% of users by ben: lunch"
    assert load_routing(database).adapters["chat"].weight == 0.5
    clock.advance(1000)
    resumed = rollouts.resume("chat", actor="ann")
    assert (resumed.state, resumed.paused_by, resumed.step) == (RolloutState.PROGRESSING, None, 1)
    assert resumed.step_started_at == START + 1100
    assert event_kinds(database)[-2:] == ["rollout.paused", "rollout.resumed"]


def test_pause_and_resume_are_refused_out_of_turn(rollouts: Rollouts) -> None:
    start(rollouts)
    with pytest.raises(ConflictError, match="chat:2 is not paused"):
        rollouts.resume("chat", actor="ann")
    rollouts.pause("chat", actor="ben")
    with pytest.raises(ConflictError, match="already paused, by ben"):
        rollouts.pause("chat", actor="ann")


@pytest.mark.parametrize("verb", ["pause", "resume", "promote", "abort"])
def test_without_a_rollout_there_is_nothing_to_do(database: Database, rollouts: Rollouts, verb: str) -> None:
    with pytest.raises(ConflictError, match="chat has no active rollout"):
        getattr(rollouts, verb)("chat", actor="ann")
    with pytest.raises(NotFoundError, match="no adapter 'chit'"):
        getattr(rollouts, verb)("chit", actor="ann")
    assert event_kinds(database) == []


# --- promote, abort ---------------------------------------------------------------------------------------------------


def test_promote_makes_the_challenger_champion_at_once(database: Database, rollouts: Rollouts) -> None:
    promote_all(rollouts, 1)
    report(database, make_replica(loaded={lora_id_of("chat", 1), lora_id_of("chat", 2)}))
    at_step(database, start(rollouts), 0)
    promoted = rollouts.promote("chat", actor="ann", reason="looks good")
    assert (promoted.state, promoted.message) == (RolloutState.PROMOTED, "promoted by ann: looks good")
    assert aliases(database) == {"champion": 2, "previous": 1}
    line = load_routing(database).adapters["chat"]
    assert (line.challenger, line.weight, line.rollout_id) == (None, 0.0, None)
    assert rollouts.active("chat") is None
    assert event_kinds(database)[-4:] == [
        "alias.set champion",
        "alias.set previous",
        "alias.removed challenger",
        "rollout.promoted",
    ]


def test_promote_needs_every_live_server_to_have_it(database: Database, rollouts: Rollouts, clock: FakeClock) -> None:
    start(rollouts)
    report(database, make_replica("a:1", loaded={lora_id_of("chat", 2)}))
    report(database, make_replica("b:2"))
    report(database, make_replica("c:3", failed={lora_id_of("chat", 2): "no such file"}))
    with pytest.raises(ConflictError, match=r"not loaded by b:2 \(still loading\), c:3 \(no such file\)"):
        rollouts.promote("chat", actor="ann")
    clock.advance(11)  # b and c die, a lives
    report(database, make_replica("a:1", loaded={lora_id_of("chat", 2)}, heartbeat_at=clock()))
    assert rollouts.promote("chat", actor="ann").state is RolloutState.PROMOTED


def test_a_paused_rollout_can_be_promoted_and_aborted(database: Database, rollouts: Rollouts) -> None:
    for verb, champion in (("promote", 2), ("abort", 2)):
        start(rollouts, 2 if verb == "promote" else 3)
        rollouts.pause("chat", actor="ben")
        assert getattr(rollouts, verb)("chat", actor="ann").paused_by is None
        assert aliases(database)["champion"] == champion


def test_abort_gives_all_traffic_back(database: Database, rollouts: Rollouts) -> None:
    promote_all(rollouts, 1)
    at_step(database, start(rollouts), 1)
    before = read_revision(database)
    aborted = rollouts.abort("chat", actor="ann", reason="rude")
    assert (aborted.state, aborted.weight, aborted.message) == (RolloutState.ABORTED, 0.0, "aborted by ann: rude")
    assert aliases(database) == {"champion": 1, "previous": 0}
    line = load_routing(database).adapters["chat"]
    assert (line.challenger, line.weight) == (None, 0.0)
    assert read_revision(database) > before  # servers see it
    assert event_kinds(database)[-2:] == ["alias.removed challenger", "rollout.aborted"]


# --- rollback ---------------------------------------------------------------------------------------------------------


def test_rollback_of_a_rollout_is_an_abort(database: Database, rollouts: Rollouts) -> None:
    promote_all(rollouts, 1)
    at_step(database, start(rollouts), 1)
    result = rollouts.rollback("chat", actor="ann")
    assert (result.from_number, result.to_number, result.pending, result.rollout_id) == (2, 1, False, None)
    assert aliases(database) == {"champion": 1, "previous": 0}
    assert rollouts.list("chat")[0].state is RolloutState.ABORTED
    assert event_kinds(database)[-3:] == ["alias.removed challenger", "rollout.aborted", "rollout.rolled_back"]


def test_rollback_returns_to_the_previous_version_and_only_once(database: Database, rollouts: Rollouts) -> None:
    promote_all(rollouts, 1, 2)
    result = rollouts.rollback("chat", actor="ann", reason="rude")
    assert (result.from_number, result.to_number, result.pending) == (2, 1, False)
    assert result.routing_revision == read_revision(database)
    assert aliases(database) == {"champion": 1}
    assert event_kinds(database)[-3:] == ["alias.set champion", "alias.removed previous", "rollout.rolled_back"]
    event = list_events(database, limit=1000)[-1]
    assert (event.actor, event.reason, event.data) == ("ann", "rude", {"from": 2, "to": 1})
    with pytest.raises(ConflictError, match=r"no previous version to return to.*--to N"):
        rollouts.rollback("chat", actor="ben")  # two operators in a hurry must not bring 2 back
    assert aliases(database) == {"champion": 1}


def test_the_first_version_rolls_back_to_the_base(database: Database, rollouts: Rollouts) -> None:
    promote_all(rollouts, 1)
    assert rollouts.rollback("chat", actor="ann").to_number == 0
    assert load_routing(database).adapters["chat"].champion == 0


@pytest.mark.parametrize("to", [0, 2])  # the base, and `previous`: loaded everywhere
def test_rollback_to_what_is_loaded_is_immediate(database: Database, rollouts: Rollouts, to: int) -> None:
    promote_all(rollouts, 1, 2, 3)
    result = rollouts.rollback("chat", to=to, actor="ann")
    assert (result.from_number, result.to_number, result.pending) == (3, to, False)
    assert aliases(database) == {"champion": to}


def test_rollback_to_an_older_version_loads_it_first(database: Database, rollouts: Rollouts) -> None:
    promote_all(rollouts, 1, 2, 3)
    at_step(database, start(rollouts, 4), 0)
    result = rollouts.rollback("chat", to=1, actor="ann", reason="both are rude")
    assert (result.from_number, result.to_number, result.pending) == (4, 1, True)
    rollout = rollouts.active("chat")
    assert rollout is not None
    assert (rollout.id, rollout.number, rollout.stable) == (result.rollout_id, 1, 3)
    assert (rollout.steps, rollout.every_s, rollout.after_requests, rollout.guard) == ((1.0,), None, None, False)
    assert aliases(database) == {"champion": 3, "challenger": 1, "previous": 2}  # nobody meets it before it is loaded
    assert event_kinds(database)[-4:] == [
        "alias.removed challenger",
        "rollout.aborted",
        "alias.set challenger",
        "rollout.started",
    ]


def test_rollback_to_the_champion_ends_the_rollout(database: Database, rollouts: Rollouts) -> None:
    promote_all(rollouts, 1)
    start(rollouts, 2)
    assert not rollouts.rollback("chat", to=1, actor="ann").pending
    assert rollouts.active("chat") is None
    assert aliases(database) == {"champion": 1, "previous": 0}


@pytest.mark.parametrize(
    "why", [{}, {lora_id_of("chat", 1): "RejectedError: digest_mismatch"}], ids=["still loading", "failed"]
)
def test_a_rollback_to_what_a_live_server_lacks_is_refused_and_says_what_helps(
    database: Database, rollouts: Rollouts, why: dict[int, str]
) -> None:
    promote_all(rollouts, 1, 2)
    waiting = start(rollouts, 3)
    report(database, make_replica("a:1", loaded={lora_id_of("chat", 1), lora_id_of("chat", 2)}))
    report(database, make_replica("b:2", loaded={lora_id_of("chat", 2)}, failed=why))
    before, names, kinds = read_revision(database), aliases(database), event_kinds(database)
    with pytest.raises(ConflictError) as refused:
        rollouts.rollback("chat", actor="ann")
    reason = next(iter(why.values()), "still loading")
    assert str(refused.value) == (
        f"chat:1 is not loaded by b:2 ({reason}): nothing was changed, users still meet chat:2; "
        "`scion rollback chat --to 0` gives them the base at once, "
        "`scion rollback chat --to 1` returns to chat:1 once it is loaded"
    )
    assert (read_revision(database), aliases(database), event_kinds(database)) == (before, names, kinds)
    assert rollouts.active("chat") == waiting
    assert rollouts.rollback("chat", to=0, actor="ann").pending is False
    assert aliases(database) == {"champion": 0}


def test_a_rollback_to_a_previous_by_name_loads_it_first_where_it_is_lacking(
    database: Database, rollouts: Rollouts, clock: FakeClock
) -> None:
    promote_all(rollouts, 1, 2)
    report(database, make_replica("b:2", loaded={lora_id_of("chat", 2)}))
    result = rollouts.rollback("chat", to=1, actor="ann")
    assert (result.from_number, result.to_number, result.pending) == (2, 1, True)
    for _ in range(3):
        controller.tick(database, clock, heartbeat_ttl_s=10.0)
    line = load_routing(database).adapters["chat"]
    assert (line.champion, line.weight, line.rollout_id) == (2, 0.0, result.rollout_id)
    with pytest.raises(ConflictError, match="`scion rollout promote chat` returns to chat:1 once it is loaded"):
        rollouts.rollback("chat", actor="ben")  # `--to 1` would be refused: it is the challenger
    report(database, make_replica("b:2", loaded={lora_id_of("chat", 1), lora_id_of("chat", 2)}))
    for _ in range(2):
        controller.tick(database, clock, heartbeat_ttl_s=10.0)
    assert aliases(database) == {"champion": 1}


@pytest.mark.parametrize("to", [None, 1])
def test_a_rollback_to_what_all_live_servers_hold_is_immediate(
    database: Database, rollouts: Rollouts, clock: FakeClock, to: int | None
) -> None:
    promote_all(rollouts, 1, 2)
    report(database, make_replica("dead:1"))
    clock.advance(11)
    held = {lora_id_of("chat", 1), lora_id_of("chat", 2)}
    report(database, make_replica("a:1", loaded=held, heartbeat_at=clock()))
    assert not rollouts.rollback("chat", to=to, actor="ann").pending
    assert aliases(database) == {"champion": 1}


def test_what_a_return_removed_does_not_come_back(database: Database, rollouts: Rollouts, clock: FakeClock) -> None:
    promote_all(rollouts, 1, 2, 3)
    assert rollouts.rollback("chat", to=1, actor="ann", reason="2 and 3 are rude").pending
    report(database, make_replica(loaded={lora_id_of("chat", number) for number in (1, 2, 3)}))
    for _ in range(2):
        controller.tick(database, clock, heartbeat_ttl_s=10.0)
    assert aliases(database) == {"champion": 1}
    assert list_events(database, limit=1000)[-1].data == {
        "rollout_id": rollouts.list("chat", limit=1)[0].id,
        "champion": 1,
        "previous": None,
    }
    with pytest.raises(ConflictError, match=r"no previous version to return to"):
        rollouts.rollback("chat", actor="ben")
    quarantine(database, VersionRef("chat", 1), actor="server-1", reason="its files are gone")
    assert load_routing(database).adapters["chat"].champion == 0


@pytest.mark.parametrize("every_s", [0.0, 300.0])
def test_a_rollout_to_everybody_is_no_return(database: Database, rollouts: Rollouts, every_s: float) -> None:
    promote_all(rollouts, 1)
    rollouts.start(CHAT_2, steps=(1.0,), every_s=every_s, guard=False, actor="ann")
    rollouts.promote("chat", actor="ann")
    assert aliases(database) == {"champion": 2, "previous": 1}


@pytest.mark.parametrize("approve_first", [0, 9])  # still loading, or waiting for a person
def test_a_rollout_without_traffic_does_not_keep_users_on_a_bad_champion(
    database: Database, rollouts: Rollouts, approve_first: int
) -> None:
    promote_all(rollouts, 1, 2)
    waiting = start(rollouts, 3, approve_first=approve_first)
    result = rollouts.rollback("chat", actor="ann", reason="2 is rude")
    assert (result.from_number, result.to_number, result.pending) == (2, 1, False)
    assert rollouts.get(waiting.id).state is RolloutState.ABORTED
    assert aliases(database) == {"champion": 1}
    event = list_events(database, limit=1000)[-1]
    assert (event.kind, event.data) == ("rollout.rolled_back", {"from": 2, "to": 1})


def test_a_rollout_without_traffic_and_no_previous_is_no_success(database: Database, rollouts: Rollouts) -> None:
    promote_all(rollouts, 1, 2)
    rollouts.rollback("chat", actor="ann")
    waiting = start(rollouts, 3)
    with pytest.raises(ConflictError, match=r"champion is chat:1.*--to N.*scion rollout abort chat"):
        rollouts.rollback("chat", actor="ben")
    assert rollouts.active("chat") == waiting


def test_on_the_base_a_rollback_ends_what_waits(database: Database, rollouts: Rollouts) -> None:
    start(rollouts, 1)
    result = rollouts.rollback("chat", actor="ann")
    assert (result.from_number, result.to_number, result.pending) == (1, 0, False)
    assert (rollouts.active("chat"), aliases(database)) == (None, {})


REFUSED_ROLLBACKS = [
    # to, error, message (champion is 2, previous 1, challenger 3)
    (3, ConflictError, "chat:3 is the challenger: use `scion rollout promote chat`"),
    (5, ConflictError, "chat:5 is candidate"),
    (6, ConflictError, "chat:6 is rejected"),
    (99, NotFoundError, "chat:99 does not exist"),
    (-1, NotFoundError, "chat:-1 does not exist"),
]


@pytest.mark.parametrize(("to", "error", "says"), REFUSED_ROLLBACKS)
def test_a_refused_rollback_changes_nothing(
    database: Database, rollouts: Rollouts, to: int, error: type[Exception], says: str
) -> None:
    promote_all(rollouts, 1, 2)
    rollout = start(rollouts, 3)
    kinds = event_kinds(database)
    with pytest.raises(error, match=says):
        rollouts.rollback("chat", to=to, actor="ann")
    assert rollouts.active("chat") == rollout
    assert event_kinds(database) == kinds


def test_rollback_is_refused_when_there_is_nowhere_to_go(rollouts: Rollouts) -> None:
    with pytest.raises(ConflictError, match="no previous version"):
        rollouts.rollback("chat", actor="ann")
    with pytest.raises(ConflictError, match="chat:0 is the champion already"):
        rollouts.rollback("chat", to=0, actor="ann")
    with pytest.raises(NotFoundError, match="no adapter"):
        rollouts.rollback("chit", actor="ann")


# --- the trail --------------------------------------------------------------------------------------------------------

TRAIL = [
    # what is done (champion 2, previous 1, challenger 3 at 10%), exactly the events it writes
    ("pause", ["rollout.paused"]),
    ("promote", ["alias.set champion", "alias.set previous", "alias.removed challenger", "rollout.promoted"]),
    ("abort", ["alias.removed challenger", "rollout.aborted"]),
    ("rollback", ["alias.removed challenger", "rollout.aborted", "rollout.rolled_back"]),
]


@pytest.mark.parametrize(("verb", "kinds"), TRAIL)
def test_each_change_leaves_exactly_its_trail(
    database: Database, rollouts: Rollouts, verb: str, kinds: list[str]
) -> None:
    promote_all(rollouts, 1, 2)
    at_step(database, start(rollouts, 3), 0)
    last = list_events(database, limit=1000)[-1].id
    getattr(rollouts, verb)("chat", actor="ann", reason="because")
    events = list_events(database, after_id=last)
    assert event_kinds(database)[-len(events) :] == kinds
    assert {(event.actor, event.reason, event.adapter) for event in events} == {("ann", "because", "chat")}


# --- in general -------------------------------------------------------------------------------------------------------

VERBS: list[Callable[[Rollouts], object]] = [
    lambda r: r.pause("chat", actor="ann"),
    lambda r: r.promote("chat", actor="ann"),
    lambda r: r.abort("chat", actor="ann"),
    lambda r: r.rollback("chat", actor="ann"),
]


@pytest.mark.parametrize("verb", VERBS)
def test_a_change_that_was_decided_before_a_persons_verb_is_dropped(
    database: Database, rollouts: Rollouts, verb: Callable[[Rollouts], object]
) -> None:
    seen = start(rollouts)
    verb(rollouts)
    state, names, kinds = rollouts.get(seen.id), aliases(database), event_kinds(database)
    with pytest.raises(StaleRolloutError), database.write() as connection:
        transitions.set_step(connection, seen, 1, "", Cause("controller", "", START))
    with pytest.raises(StaleRolloutError), database.write() as connection:
        transitions.promote(connection, seen, "", Cause("controller", "", START))
    assert (rollouts.get(seen.id), aliases(database), event_kinds(database)) == (state, names, kinds)


def test_the_list_is_newest_first(rollouts: Rollouts, clock: FakeClock) -> None:
    for number in (1, 2, 3):
        start(rollouts, number)
        rollouts.abort("chat", actor="ann")
        clock.advance(1)
    assert [rollout.number for rollout in rollouts.list()] == [3, 2, 1]
    assert [rollout.number for rollout in rollouts.list("chat", limit=2)] == [3, 2]
    with pytest.raises(NotFoundError, match="rollout 'nope' does not exist"):
        rollouts.get("nope")


def test_people_and_the_controller_at_once_leave_a_legal_state(database: Database, rollouts: Rollouts) -> None:
    loaded = {lora_id_of("chat", number) for number in (1, 2, 3, 4)}
    report(database, make_replica(loaded=loaded))
    unexpected: list[BaseException] = []

    def repeat(action: Callable[[int], object]) -> None:
        for number in range(15):
            try:
                action(number)
            except ConflictError:
                continue  # somebody else was faster
            except BaseException as error:
                unexpected.append(error)
                raise

    def begin(number: int) -> None:
        rollouts.start(VersionRef("chat", 1 + number % 4), steps=STEPS, every_s=0.0, actor="ann")

    def verb(number: int) -> None:
        getattr(rollouts, ("pause", "resume", "promote", "abort", "rollback")[number % 5])("chat", actor="ben")

    actions: list[Callable[[int], object]] = [
        begin,
        begin,
        verb,
        lambda number: rollouts.rollback("chat", to=number % 5, actor="cho"),
        lambda _: controller.tick(database, FakeClock(), heartbeat_ttl_s=10.0),
        lambda _: controller.tick(database, FakeClock(), heartbeat_ttl_s=10.0),
    ]
    threads = [threading.Thread(target=repeat, args=(action,)) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert unexpected == []
    active = [rollout for rollout in rollouts.list("chat", limit=1000) if rollout.state.is_active]
    names = aliases(database)
    assert len(active) <= 1
    assert names.get("challenger") == (active[0].number if active else None)
    assert names.get("champion", 0) != names.get("challenger")
    kinds = event_kinds(database)
    ended = kinds.count("rollout.promoted") + kinds.count("rollout.aborted")
    assert kinds.count("rollout.started") == ended + len(active)
    assert kinds.count("controller.failed") == 0
