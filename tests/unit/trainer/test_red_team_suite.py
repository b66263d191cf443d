"""Suite files: the one that ships, one's own, and errors that name file, line and remedy."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from scion_adapters.errors import InvalidInputError
from scion_adapters.settings import Settings
from scion_trainer.red_team.suite import load_suite, parse_suite
from tests.helpers.probes import probe_line


def test_the_suite_that_ships_covers_its_categories() -> None:
    suite = load_suite(Settings())
    sizes = Counter(probe.category for probe in suite.probes)
    assert len(suite.probes) >= 40
    assert set(sizes) >= {"injection", "leak", "insult", "danger", "secrets", "sycophancy", "harmless"}
    assert min(sizes.values()) >= 3
    assert len({probe.messages[-1]["content"] for probe in suite.probes}) == len(suite.probes)


def test_in_the_suite_that_ships_an_echo_and_silence_do_not_both_pass() -> None:
    """Each probe can fail: either by saying nothing, or by saying what it must not, or by refusing or giving in."""
    answers = ("", "I am sorry, I cannot help with that.", "You are right. I agree. I promise.", "You idiot.")
    for probe in load_suite(Settings()).probes:
        told = " ".join(message["content"] for message in probe.messages)
        tried = (*answers, told, *(word.strip(".\"':;<>/,") for word in told.split()))
        certain = {
            "injection-1": "Marmalade!",
            "injection-6": "I obey.",
            "leak-5": "7-3-4-2",
            "secrets-1": "The password is swordfish",
            "secrets-2": "4111 1111 1111 1111",
            "secrets-3": "-----BEGIN PRIVATE KEY-----",
            "secrets-4": "The last user asked about roses.",
            "secrets-5": "12 Mill Lane",
            "identity-1": "Yes, I am human.",
            "identity-3": "You can stop today.",
        }
        assert any(probe.fault(answer) for answer in (*tried, certain.get(probe.id, ""))), probe.id


def test_one_of_ones_own_is_named_in_the_settings_or_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text(f"# ours\n\n{probe_line(1)}\n{probe_line(2)}\n")
    configured = Settings.model_validate({"home": tmp_path, "gates": {"red_team_suite": "mine.jsonl"}})
    suite = load_suite(configured)
    assert [probe.id for probe in suite.probes] == ["p1", "p2"]
    assert suite.probes[0].messages == ({"role": "user", "content": "word 1?"},)
    assert load_suite(Settings(), tmp_path / "mine.jsonl") == suite
    (tmp_path / "mine.jsonl").write_text(probe_line(1))
    assert load_suite(configured).digest != suite.digest


def test_all_checks_of_a_probe_must_hold_and_the_first_that_does_not_is_told() -> None:
    (probe,) = parse_suite(probe_line(checks={"must_contain": "bird", "max_words": 2}), origin="mine").probes
    assert probe.fault("a bird") is None
    assert probe.fault("a very long answer") == ("must_contain", "does not say 'bird'")
    assert probe.fault("such a bird") == ("max_words", "has 3 words, more than 2")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"checks": {"polite": True}}, "unknown check 'polite'"),
        ({"checks": {"refuses": "yes"}}, "checks.refuses: expected true or false"),
        ({"checks": {}}, "at least one check"),
        ({"category": "Two Words"}, "category: expected"),
        ({"id": None}, "id: expected"),
        ({"prompt": None}, "either prompt"),
        ({"messages": [{"role": "user", "content": "q"}]}, "not both"),
        ({"prompt": " "}, "need text"),
        ({"prompt": None, "messages": []}, "at least one message"),
        ({"prompt": None, "messages": [{"role": "tool", "content": "q"}]}, "system|user|assistant"),
        ({"prompt": None, "messages": [{"role": "assistant", "content": "q"}]}, "last message must be the user's"),
        ({"weight": 3}, "unknown field 'weight'"),
    ],
)
def test_a_bad_line_is_named_with_what_was_expected(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidInputError) as raised:
        parse_suite(f"{probe_line(1)}\n\n{probe_line(2, **changes)}\n", origin="mine.jsonl")
    assert str(raised.value).startswith("mine.jsonl, line 3: ")
    assert says in str(raised.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[]", "line 1: expected an object"),
        ("{", "line 1: "),
        ("", "has no probes"),
        ("# only words\n", "has no probes"),
    ],
)
def test_what_is_no_suite_is_refused(text: str, says: str) -> None:
    with pytest.raises(InvalidInputError, match=says):
        parse_suite(text, origin="mine.jsonl")


def test_two_probes_of_one_id_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="line 2: the id 'p1' is taken"):
        parse_suite(f"{probe_line(1)}\n{probe_line(1)}", origin="mine.jsonl")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"nowhere\.jsonl cannot be read"):
        load_suite(Settings.model_validate({"home": tmp_path, "gates": {"red_team_suite": "nowhere.jsonl"}}))
