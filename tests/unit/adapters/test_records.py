"""Names and references: what is one, and what only looks like one."""

from __future__ import annotations

import pytest

from scion_adapters.errors import InvalidInputError
from scion_adapters.records import Rollout, RolloutState, VersionRef, check_adapter_name, parse_version_ref

NAMES = ["chat", "a", "7", "chat-2.5_b", "x" * 64]


@pytest.mark.parametrize("name", NAMES)
def test_names(name: str) -> None:
    assert check_adapter_name(name) == name


# what a name may not be, since it becomes a folder, part of a model name and part of a URL
NO_NAMES = [
    "",  # nothing
    "Chat",  # names differ by more than case
    "chat:7",  # a version
    "chat@champion",  # an alias
    "../chat",  # a way out
    "a/b",  # a folder
    ".",  # this folder
    "..",  # the folder above
    "-x",  # looks like an option
    "chat ",  # invisible difference
    "chat\n",  # the same: `$` alone would let it pass
    "çhat",  # letters that look alike
    "x" * 65,  # longer than its column
]


@pytest.mark.parametrize("name", NO_NAMES)
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(InvalidInputError, match="expected 1 to 64"):
        check_adapter_name(name)


@pytest.mark.parametrize(
    ("text", "number"), [("chat:7", 7), ("chat:0", 0), ("chat:007", 7), ("chat:999999999", 999999999)]
)
def test_references(text: str, number: int) -> None:
    ref = parse_version_ref(text)
    assert ref == VersionRef("chat", number)
    assert str(ref) == f"chat:{number}"


# what looks like a version and is none
NO_REFERENCES = [
    "chat",
    "chat:",
    ":7",
    "chat:-1",
    "chat:+7",
    "chat:7.0",
    "chat:٧",
    "chat:²",
    "chat: 7",
    "chat:7:8",
    "chat:1" + "0" * 9,
]


@pytest.mark.parametrize("text", NO_REFERENCES)
def test_what_is_no_reference(text: str) -> None:
    with pytest.raises(InvalidInputError):
        parse_version_ref(text)


# state, step, the share of users that the challenger gets, and the one that the version has
WEIGHTS = [
    (RolloutState.PROGRESSING, -1, 0.0, 0.0),  # still loading
    (RolloutState.PROGRESSING, 0, 0.1, 0.1),  # the first step
    (RolloutState.PAUSED, 1, 0.5, 0.5),  # pausing keeps the share
    (RolloutState.ABORTED, 1, 0.0, 0.0),  # over
    (RolloutState.PROMOTED, 2, 0.0, 1.0),  # over: it is the champion now
    (RolloutState.PROMOTED, 0, 0.0, 1.0),  # promoted by hand, before its last step
]


@pytest.mark.parametrize(("state", "step", "weight", "share"), WEIGHTS)
def test_the_weight_of_a_rollout(state: RolloutState, step: int, weight: float, share: float) -> None:
    rollout = Rollout(
        id="r", adapter="chat", number=2, stable=1, state=state, steps=(0.1, 0.5, 1.0), step=step, every_s=None,
        after_requests=None, guard=True, step_started_at=0, message="", actor="me", created_at=0, updated_at=0,
        revision=0,
    )  # fmt: skip
    assert rollout.weight == weight
    assert rollout.share == share
