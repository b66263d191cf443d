"""The controller's decisions, as given / when / then."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest

from scion_adapters.analysis import UserVotes
from scion_adapters.controller import Action, Decision, decide
from scion_adapters.records import Replica, Rollout, RolloutState
from tests.helpers.rollouts import START, make_replica

LORA_ID = 108
LIKED = UserVotes(users=60, votes=60, mean=0.9, mean_square=0.9)
DISLIKED = UserVotes(users=60, votes=60, mean=0.2, mean_square=0.2)

TIMED = Rollout(
    id="rollout-1",
    adapter="chat",
    number=8,
    stable=7,
    state=RolloutState.PROGRESSING,
    steps=(0.1, 0.5, 1.0),
    step=0,
    every_s=300.0,
    after_requests=None,
    guard=True,
    step_started_at=START,
    message="",
    actor="ann",
    created_at=START - 10,
    updated_at=START,
    revision=3,
)
COUNTED = replace(TIMED, every_s=None, after_requests=50)
HAS_IT = make_replica("a:1", loaded={107, LORA_ID})
LACKS_IT = make_replica("b:2", loaded={107})
BROKEN = make_replica("c:3", loaded={107}, failed={LORA_ID: "no such file"})


@dataclass(frozen=True, slots=True)
class Case:
    id: str
    given: Rollout
    then: Action
    live: tuple[Replica, ...] = (HAS_IT,)
    after_s: float = 0.0
    requests: int = 0
    votes: Mapping[int, UserVotes] | None = None
    step: int | None = None
    says: str = ""


CASES = [
    # --- loading first ---
    Case("nothing live: wait", replace(TIMED, step=-1), Action.HOLD, live=(), says="no live server"),
    Case("one lacks it: wait", replace(TIMED, step=-1), Action.HOLD, live=(HAS_IT, LACKS_IT), says="loaded by b:2"),
    Case("one cannot: say why", replace(TIMED, step=-1), Action.HOLD, live=(HAS_IT, BROKEN), says="c:3 (no such file)"),
    Case("all have it: first step", replace(TIMED, step=-1), Action.SET_STEP, step=0, says="step 1 of 3: 10%"),
    Case("time does not count while loading", replace(TIMED, step=-1), Action.HOLD, live=(LACKS_IT,), after_s=9e9),
    # --- by time ---
    Case("step not over", TIMED, Action.HOLD, after_s=299.9, says="step 1 of 3: 10% of users, for 5m"),
    Case("step over", TIMED, Action.SET_STEP, after_s=300.0, step=1, says="step 2 of 3: 50%"),
    Case("one step at a time, however late", TIMED, Action.SET_STEP, after_s=9e9, step=1),
    Case("the last step lasts as well", replace(TIMED, step=2), Action.HOLD, after_s=299.9),
    Case("the last step is over: promote", replace(TIMED, step=2), Action.PROMOTE, after_s=300.0),
    Case("no duration: at once", replace(TIMED, every_s=0.0, step=2), Action.PROMOTE),
    Case("clock set back: wait", TIMED, Action.HOLD, after_s=-3600.0),
    # --- by answers ---
    Case("too few answers, however late", COUNTED, Action.HOLD, after_s=9e9, requests=49, says="until 50 answers"),
    Case("enough answers", COUNTED, Action.SET_STEP, requests=50, step=1),
    Case("enough answers on the last step", replace(COUNTED, step=2), Action.PROMOTE, requests=50),
    # --- a server joins or dies on the way ---
    Case("a new server lacks it: no next step", TIMED, Action.HOLD, live=(HAS_IT, LACKS_IT), after_s=300.0),
    Case("a new server lacks it: no promotion", replace(TIMED, step=2), Action.HOLD, live=(LACKS_IT,), after_s=300.0),
    Case("all servers died: no next step", TIMED, Action.HOLD, live=(), after_s=300.0),
    # --- the guard ---
    Case("disliked: abort", TIMED, Action.ABORT, votes={7: LIKED, 8: DISLIKED}, says="liked 20% against"),
    Case("disliked: abort before anything else", TIMED, Action.ABORT, live=(), votes={7: LIKED, 8: DISLIKED}),
    Case("disliked at the end", replace(TIMED, step=2), Action.ABORT, after_s=300.0, votes={7: LIKED, 8: DISLIKED}),
    Case("disliked, guard off", replace(TIMED, guard=False), Action.HOLD, votes={7: LIKED, 8: DISLIKED}),
    Case("liked more: the plan goes on", TIMED, Action.HOLD, votes={7: DISLIKED, 8: LIKED}),
    Case("too few votes: the plan goes on", TIMED, Action.HOLD, votes={7: LIKED, 8: replace(DISLIKED, users=9)}),
    Case("votes on one side only", TIMED, Action.SET_STEP, after_s=300.0, votes={8: DISLIKED}, step=1),
    # --- people ---
    Case("paused: untouched", replace(TIMED, state=RolloutState.PAUSED), Action.HOLD, after_s=9e9),
    Case(
        "paused: untouched, also by the guard",
        replace(TIMED, state=RolloutState.PAUSED),
        Action.HOLD,
        votes={7: LIKED, 8: DISLIKED},
    ),
    Case("ended: untouched", replace(TIMED, state=RolloutState.ABORTED), Action.HOLD, after_s=9e9),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_decide(case: Case) -> None:
    decision = decide(
        case.given,
        live=case.live,
        lora_id=LORA_ID,
        requests_on_step=case.requests,
        votes=case.votes or {},
        now=START + case.after_s,
    )
    assert (decision.action, decision.step) == (case.then, case.step)
    assert case.says in decision.message


def test_holding_says_the_same_as_the_step_did_so_that_it_writes_nothing() -> None:
    def at(rollout: Rollout, after_s: float) -> Decision:
        return decide(rollout, live=(HAS_IT,), lora_id=LORA_ID, requests_on_step=0, votes={}, now=START + after_s)

    begun = at(replace(TIMED, step=-1), 0.0)
    assert {at(TIMED, seconds).message for seconds in (0.0, 100.0, 299.0)} == {begun.message}


def test_an_abort_gives_the_figures() -> None:
    votes = {7: LIKED, 8: DISLIKED}
    message = decide(TIMED, live=(HAS_IT,), lora_id=LORA_ID, requests_on_step=0, votes=votes, now=START).message
    for figure in ("chat:8 less than chat:7", "20%", "90%", "60 and 60 users", "99.9% confidence"):
        assert figure in message
