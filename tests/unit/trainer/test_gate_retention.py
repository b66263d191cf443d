"""The retention gate: what counts as forgotten, and which sets can be used."""

from __future__ import annotations

from pathlib import Path

import pytest

from scion_adapters.errors import InvalidInputError
from scion_adapters.settings import Settings
from scion_trainer.gates.retention import MIN_KNOWN, Recall, RetentionGate, combine, decide, load_items, parse_items
from scion_trainer.gates.types import GateResult, RetentionItem, Verdict
from tests.helpers.fake_server import Persona
from tests.helpers.gates import gate_context, known_item


def recalls(base: float, parent: float, candidate: float, count: int = 20) -> list[Recall]:
    return [Recall(known_item(f"q{i}"), base, parent, candidate) for i in range(count)]


@pytest.mark.parametrize(
    ("measured", "verdict"),
    [
        (recalls(-0.1, -0.1, -0.1), Verdict.PASS),  # nothing lost
        (recalls(-0.5, -0.3, -0.1), Verdict.PASS),  # better than both
        (recalls(-0.1, -0.1, -0.15), Verdict.PASS),  # a little
        (recalls(-0.1, -0.1, -0.4), Verdict.FAIL),  # too much
        (recalls(-0.1, -0.4, -0.4), Verdict.FAIL),  # the parent was worse already: drift must not add up
        (recalls(-0.5, -0.1, -0.5), Verdict.FAIL),  # as good as the base, and all that was learnt since is lost
        (recalls(-9.0, -9.0, -1.0), Verdict.UNMEASURABLE),  # the base knows none of it, so none can be forgotten
        # Guessing unknown answers better must not hide what was forgotten.
        ([*recalls(-16.0, -16.0, -13.0), *recalls(-0.1, -0.1, -1.0)], Verdict.FAIL),
        (recalls(-0.1, -0.1, -0.1, MIN_KNOWN), Verdict.PASS),  # just enough
        (recalls(-0.1, -0.1, -9.0, MIN_KNOWN - 1), Verdict.UNMEASURABLE),  # too few to judge by
        (recalls(-0.1, -0.1, float("nan")), Verdict.FAIL),  # not a number is a loss
        ([], Verdict.UNMEASURABLE),  # nothing fits the server
    ],
)
def test_the_decision(measured: list[Recall], verdict: Verdict) -> None:
    result = decide(measured, max_drop=0.12)
    assert result.verdict is verdict, result.reason
    assert result.reason


def test_the_worst_five_are_told() -> None:
    measured = [Recall(known_item(f"q{i}"), -0.1, -0.1, -0.1 - i) for i in range(10)]
    worst = decide(measured, max_drop=0.12).details["worst"]
    assert [item["question"] for item in worst] == ["q9", "q8", "q7", "q6", "q5"]
    assert worst[0]["drop"] == pytest.approx(9.0)


def test_the_answer_is_scored_after_its_prefix() -> None:
    heard: list[str] = []

    def finds(prompt: object, before: object, token: int) -> float:
        heard.append("".join(map(chr, [*prompt, *before])))  # type: ignore[misc]
        return -3.0 if len(heard) % 4 == 0 else -0.1

    items = [known_item(f"q{i}") for i in range(9)]
    result = RetentionGate().run(gate_context({"chat:8": Persona(finds=finds)}, retention=items))
    assert heard[0].endswith("<assistant>it is")  # the first token of " yes" after what is forced
    assert result.figures["known"] == 9
    assert result.figures["candidate_logprob"] == pytest.approx((-0.1 * 3 - 3.0) / 4)


def test_items_that_do_not_fit_the_server_are_left_out() -> None:
    items = [*(known_item(f"q{i}") for i in range(9)), known_item("x" * 2000)]
    assert RetentionGate().run(gate_context(retention=items)).figures["items"] == 9


SAYS = Persona(says=lambda prompt: "it is yes, surely")
SILENT = Persona(says=lambda prompt: "who knows")


def test_what_is_likely_and_no_longer_said_is_forgotten() -> None:
    items = [known_item(f"q{i}") for i in range(12)]
    result = RetentionGate().run(gate_context({"base": SAYS, "chat:7": SAYS, "chat:8": SILENT}, retention=items))
    assert result.verdict is Verdict.FAIL
    assert result.figures["drop_from_base"] == 0.0
    assert result.figures["free_missed"] == 1.0
    assert "asked freely, misses 24 of 24 answers, the parent 0" in result.reason


@pytest.mark.parametrize(
    ("forced", "free", "verdict"),
    [
        (Verdict.PASS, Verdict.PASS, Verdict.PASS),
        (Verdict.FAIL, Verdict.PASS, Verdict.FAIL),
        (Verdict.PASS, Verdict.FAIL, Verdict.FAIL),
        (Verdict.PASS, Verdict.INCONCLUSIVE, Verdict.INCONCLUSIVE),
        (Verdict.FAIL, Verdict.UNMEASURABLE, Verdict.FAIL),
        (Verdict.PASS, Verdict.UNMEASURABLE, Verdict.PASS),  # answers too long to be said word for word
    ],
)
def test_both_parts_are_told_and_the_worse_decides(forced: Verdict, free: Verdict, verdict: Verdict) -> None:
    result = combine(GateResult("retention", forced, "forced: a"), GateResult("retention", free, "freely: b"))
    assert result.verdict is verdict
    assert ("forced" in result.reason) is (forced is not Verdict.PASS or verdict is Verdict.PASS is free)
    assert ("freely" in result.reason) is (free is not Verdict.PASS or verdict is Verdict.PASS)


def test_the_built_in_set_is_used_unless_another_is_named(tmp_path: Path) -> None:
    built_in = load_items(Settings.model_validate({}))
    assert len(built_in) >= 60
    assert all(item.answer.startswith(" ") and item.prefix for item in built_in)  # cut between words
    assert len({item.messages[0]["content"] for item in built_in}) == len(built_in)
    (tmp_path / "mine.jsonl").write_text('{"messages": [{"role": "user", "content": "q"}], "answer": "a"}\n\n')
    (item,) = load_items(Settings.model_validate({"home": tmp_path, "gates": {"retention_file": "mine.jsonl"}}))
    assert (item.prefix, item.answer) == ("", "a")


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[]",
        '{"messages": [], "answer": "a"}',  # no question
        '{"messages": [{"content": "q"}], "answer": "a"}',  # nobody says it
        '{"messages": [{"role": "user", "content": "q"}], "answer": ""}',  # nothing to score
        '{"prompt": "q", "answer": "a"}',  # another format
        '{"messages": [{"role": "user", "content": "q"}], "answer": "a", "said": "b"}',  # letters, not answers
        '{"messages": [{"role": "user", "content": "q"}], "answer": "a", "said": [" "]}',  # is said by everybody
    ],
)
def test_a_bad_line_is_named(line: str) -> None:
    good = '{"messages": [{"role": "user", "content": "q"}], "answer": "a"}'
    with pytest.raises(InvalidInputError, match=r"mine\.jsonl, line 2"):
        parse_items(f"{good}\n{line}\n", origin="mine.jsonl")


def test_a_line_may_hold_other_ends_of_lines_and_accepted_answers() -> None:
    text = '{"messages": [{"role": "user", "content": "one\u2028two\u0085"}], "answer": "a", "said": ["b", "c"]}\r\n'
    (item,) = parse_items(text, origin="mine.jsonl")
    assert item.messages[0]["content"] == "one\u2028two\u0085"
    assert item.said == ("b", "c")


def test_items_that_the_template_refuses_are_left_out() -> None:
    refused = RetentionItem(({"role": "refused", "content": "q"},), "it is", " yes")
    result = RetentionGate().run(gate_context(retention=[*(known_item(f"q{i}") for i in range(9)), refused]))
    assert result.figures["items"] == 9


def test_a_file_that_is_not_utf_8_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_bytes("é".encode("latin-1"))
    with pytest.raises(InvalidInputError, match=r"mine\.jsonl is not UTF-8"):
        load_items(Settings.model_validate({"home": tmp_path, "gates": {"retention_file": "mine.jsonl"}}))


def test_a_missing_or_empty_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"nowhere\.jsonl"):
        load_items(Settings.model_validate({"home": tmp_path, "gates": {"retention_file": "nowhere.jsonl"}}))
    with pytest.raises(InvalidInputError, match="no rows"):
        parse_items("\n", origin="mine.jsonl")
