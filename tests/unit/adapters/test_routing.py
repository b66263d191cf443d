"""Which version answers: names, the sticky split, residency, evaluation keys."""

from __future__ import annotations

import timeit
from collections.abc import Collection
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scion_adapters import routing as routing_module
from scion_adapters.errors import NotFoundError, UnavailableError
from scion_adapters.records import VersionState
from scion_adapters.routing import AdapterRouting, Assignment, Routing, ServedVersion, assign, bucket, wanted

CANDIDATE = 9


def served(number: int) -> ServedVersion:
    state = VersionState.CANDIDATE if number == CANDIDATE else VersionState.ACCEPTED
    return ServedVersion(number, 100 + number, f"sha256:{number}", state, f"key-{number}")


def make_routing(
    weight: float = 0.0,
    *,
    champion: int = 7,
    challenger: int | None = 8,
    previous: int | None = 6,
    rollout_id: str = "rollout-1",
    aliases: dict[str, int] | None = None,
    numbers: Collection[int] = (3, 5, 6, 7, 8, CANDIDATE),
) -> Routing:
    names = {"pinned": 5} if aliases is None else aliases
    line = AdapterRouting(
        adapter="chat",
        champion=champion,
        challenger=challenger,
        previous=previous,
        weight=weight,
        rollout_id=rollout_id if challenger is not None else None,
        aliases=names | {"champion": champion} | ({} if challenger is None else {"challenger": challenger}),
        versions={number: served(number) for number in numbers},
        evaluated=frozenset({CANDIDATE}),
    )
    return Routing(4, {"chat": line, "code": AdapterRouting("code", 0, None, None, 0.0, None, {}, {})})


ALL = frozenset({105, 106, 107, 108, 109})
ASKED = [
    # model, key, number, lora_id, probability, rollout
    ("chat", None, 7, 107, 1.0, None),  # weight 0: nothing is drawn yet, the challenger is being loaded
    ("chat:7", None, 7, 107, 1.0, None),  # an exact version is not drawn, also when it is the champion
    ("chat:8", None, 8, 108, 1.0, None),  # the challenger may be asked by name during its rollout
    ("chat:0", None, 0, None, 1.0, None),  # the base
    ("chat@champion", None, 7, 107, 1.0, None),
    ("chat@challenger", None, 8, 108, 1.0, None),
    ("chat@pinned", None, 5, 105, 1.0, None),  # a person's alias
    ("chat:9", "key-9", 9, 109, 1.0, None),  # a candidate, asked by the gates
    ("code", None, 0, None, 1.0, None),  # no champion yet: the base answers
    ("code@champion", None, 0, None, 1.0, None),
]


@pytest.mark.parametrize(("model", "key", "number", "lora_id", "probability", "rollout"), ASKED)
def test_a_name_means_one_version(
    model: str, key: str | None, number: int, lora_id: int | None, probability: float, rollout: str | None
) -> None:
    assignment = assign(make_routing(), model, "ann", ALL, key)
    assert assignment is not None
    assert (assignment.ref.number, assignment.lora_id) == (number, lora_id)
    assert (assignment.probability, assignment.rollout_id) == (probability, rollout)


@pytest.mark.parametrize(
    "model",
    ["base", "Chat", "chatty", "chat-2", "gpt-4o", "", ":7", "@champion", "other:7", "chat/7"],
)
def test_other_names_are_left_to_vllm(model: str) -> None:
    assert assign(make_routing(), model, "ann", ALL) is None


@pytest.mark.parametrize(
    "model",
    [
        "chat:99",  # no such version (or one that is rejected: such are never in the routing)
        "chat:3",  # accepted, but not kept loaded
        "chat@nope",
        "chat:",
        "chat@",
        "chat:07",  # one spelling per version, or the response's model would differ from the request's
        "chat:7:8",
        "chat:-1",
        "chat:9",  # a candidate without its key
        "code:1",
    ],
)
def test_our_names_that_are_not_served_say_what_is(model: str) -> None:
    with pytest.raises(NotFoundError, match=r"chat:7|code:0") as caught:
        assign(make_routing(), model, "ann", ALL)
    assert "chat:9" not in str(caught.value).removeprefix(model)  # candidates are not advertised


def test_a_candidate_needs_its_own_key() -> None:
    for wrong in (None, "", "key-7", "key-9 ", "schlüssel"):
        with pytest.raises(NotFoundError):
            assign(make_routing(), "chat:9", "ann", ALL, wrong)


def test_a_wanted_version_that_is_not_loaded_yet_is_worth_another_try() -> None:
    for model in ("chat:8", "chat@pinned", "chat@champion"):
        with pytest.raises(UnavailableError, match="try again"):
            assign(make_routing(), model, "ann", frozenset())


def test_what_is_kept_loaded() -> None:
    assert wanted(make_routing()) == {105, 106, 107, 108, 109}  # not 103: accepted, and nobody's alias
    assert wanted(make_routing(challenger=None, previous=None, aliases={})) == {107, 109}
    assert wanted(make_routing(champion=0, challenger=None, previous=0, aliases={}, numbers=(3,))) == frozenset()


def test_a_challenger_that_is_not_loaded_here_leaves_everything_to_the_champion() -> None:
    for subject in map(str, range(50)):
        assignment = assign(make_routing(0.9), "chat", subject, ALL - {108})
        assert assignment is not None
        assert (assignment.ref.number, assignment.probability, assignment.rollout_id) == (7, 1.0, None)


def test_a_champion_that_is_not_loaded_here_falls_back_to_previous() -> None:
    assignment = assign(make_routing(challenger=None), "chat", "ann", ALL - {107})
    assert assignment is not None
    assert (str(assignment.ref), assignment.lora_id, assignment.rollout_id) == ("chat:6", 106, None)
    base = assign(make_routing(challenger=None, previous=0), "chat", "ann", frozenset())
    assert base is not None
    assert (str(base.ref), base.lora_id) == ("chat:0", None)
    for nothing_left in (make_routing(challenger=None, previous=None), make_routing(challenger=None)):
        with pytest.raises(UnavailableError, match="chat:7 is not loaded"):
            assign(nothing_left, "chat", "ann", frozenset())


def test_a_champion_that_may_not_be_served_is_never_used() -> None:
    routing = make_routing(challenger=None, numbers=(6,))  # its row is rejected, hence not in the routing
    assignment = assign(routing, "chat", "ann", ALL)
    assert assignment is not None
    assert assignment.ref.number == 6


@cache
def routing_at(weight: float, rollout_id: str) -> Routing:
    return make_routing(weight, rollout_id=rollout_id)


def drawn(weight: float, subject: str, rollout_id: str = "rollout-1") -> Assignment:
    assignment = assign(routing_at(weight, rollout_id), "chat", subject, ALL)
    assert assignment is not None
    return assignment


weights = st.floats(min_value=0.0, max_value=1.0, exclude_min=True)


@given(subject=st.text(), weight=weights)
def test_sticky_and_with_the_probability_it_was_drawn_with(subject: str, weight: float) -> None:
    first = drawn(weight, subject)
    assert drawn(weight, subject) == first
    assert first.rollout_id == "rollout-1"
    assert first.probability == pytest.approx(weight if first.ref.number == 8 else 1.0 - weight)
    assert first.probability > 0.0  # what happened was possible


@given(subject=st.text(), weights=st.tuples(weights, weights))
def test_raising_the_weight_moves_only_the_added_slice(subject: str, weights: tuple[float, float]) -> None:
    low, high = sorted(weights)
    before, after = drawn(low, subject).ref.number, drawn(high, subject).ref.number
    assert (before, after) in {(7, 7), (7, 8), (8, 8)}  # nobody goes back
    assert (before == 7 and after == 8) == (low <= bucket("rollout-1", subject) < high)


@given(subject=st.text())
def test_the_last_step_takes_everybody(subject: str) -> None:
    assert drawn(1.0, subject).ref.number == 8
    assert 0.0 <= bucket("rollout-1", subject) < 1.0


def test_the_last_step_takes_even_the_highest_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    class Highest:
        def __init__(self, *_: object, **__: object) -> None: ...

        def digest(self) -> bytes:
            return b"\xff" * 8  # as a float of 64 bits this would round to 1.0, which is below no weight

    monkeypatch.setattr(routing_module, "blake2b", Highest)
    assert bucket("rollout-1", "ann") < 1.0
    assert drawn(1.0, "ann").ref.number == 8


@settings(max_examples=20, deadline=None)
@given(weight=st.floats(min_value=0.01, max_value=0.99), rollout_id=st.uuids().map(str))
def test_the_split_over_ten_thousand_subjects_is_within_a_few_standard_errors(weight: float, rollout_id: str) -> None:
    routing = make_routing(weight, rollout_id=rollout_id)
    hits = sum(assign(routing, "chat", f"user-{n}", ALL).ref.number == 8 for n in range(10_000))  # type: ignore[union-attr]
    assert abs(hits / 10_000 - weight) < 0.0225  # 4.5 standard errors at 50%: one in 150,000 examples beyond


@pytest.mark.parametrize("weight", [0.01, 0.1, 0.25, 0.5, 0.9])
def test_the_split_is_within_a_point_of_the_weight(weight: float) -> None:
    # Independent draws stray by a standard error of up to half a point: true for most rollout ids, not for all.
    hits = sum(drawn(weight, f"user-{n}", "rollout-2").ref.number == 8 for n in range(10_000))
    assert abs(hits / 10_000 - weight) < 0.01


def test_another_rollout_draws_anew() -> None:
    both = sum(
        drawn(0.5, f"user-{n}").ref.number == drawn(0.5, f"user-{n}", "rollout-2").ref.number for n in range(2_000)
    )
    assert 850 < both < 1150  # independent draws agree half of the time


def test_an_assignment_takes_less_than_ten_microseconds() -> None:
    routing = make_routing(0.5)
    rounds = 2_000
    best = min(timeit.repeat(lambda: assign(routing, "chat", "user-0123456789", ALL), number=rounds, repeat=7))
    assert best / rounds < 10e-6  # 1.3 microseconds on the machine this was written on
