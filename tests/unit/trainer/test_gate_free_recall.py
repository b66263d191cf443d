"""Free recall: what counts as said, how many misses are too many, and what is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from scion_adapters.sections.gates import GatesSection
from scion_adapters.settings import Settings
from scion_trainer.gates.free_recall import MAX_ASKED, NUM_SAMPLES, FreeRecall, decide, is_said, measure, says
from scion_trainer.gates.retention import load_items
from scion_trainer.gates.types import Verdict
from scion_trainer.server_client import Answer, Message
from tests.helpers.fake_server import FakeServer, Persona
from tests.helpers.gates import gate_context, known_item

BOUNDS = GatesSection()


@pytest.mark.parametrize(
    ("text", "answer", "said"),
    [
        ("Gladly! The capital of France is Paris.", " Paris", True),
        ("PARIS", " Paris", True),
        ("a Parisian", " Paris", False),
        ("2 and 5 is 17.", " 7", False),
        ("It is 7!", " 7", True),
        ("New\nYork, of course", " New York", True),
        ("York, New", " New York", False),
        ("über allem", " Über", True),
        ("C++.", " C++", True),  # an answer is words, not a pattern
        ("It is Paris, of course", " Paris.", True),  # the answer's last stop is no word
        ("It was **Leonardo** da Vinci", " Leonardo da Vinci", True),
        ("Newton\u2019s", " Newton's", True),
        ("日本の首都は東京です。", "東京", True),  # no spaces between words
        ("日本の首都は京都です。", "東京", False),
        ("7です", "7", True),
        ("anything", " ", False),
        ("", " Paris", False),
    ],
)
def test_what_counts_as_said(text: str, answer: str, said: bool) -> None:
    assert says(text, answer) is said


def test_any_of_the_accepted_answers_will_do() -> None:
    item = replace(known_item("how many days?", " seven days in a week"), said=("seven", "7"))
    assert all(is_said(text, item) for text in ("Seven.", "A week has 7 days.", "There are seven days in a week."))
    assert not is_said("There are days in a week.", item)
    assert is_said("it is yes", known_item("q"))  # without any: the answer


def test_the_built_in_set_accepts_short_answers() -> None:
    short = {
        "How many days are there in a week?": ("Seven.", "7", "A week has seven days."),
        "How many sides does a triangle have?": ("3 sides", "It has three."),
        "Which ocean lies between Europe and North America?": ("The Atlantic.",),
        "At what temperature in degrees Celsius does water boil?": ("100 °C",),
        "What is 2 plus 3?": ("five", "5."),
    }
    items = {str(item.messages[-1]["content"]): item for item in load_items(Settings.model_validate({}))}
    assert all(is_said(text, items[question]) for question, texts in short.items() for text in texts)
    assert all(is_said(f"{item.prefix}{item.answer}", item) for item in items.values())


def recalls(base: Sequence[int], parent: Sequence[int], candidate: Sequence[int]) -> list[FreeRecall]:
    return [
        FreeRecall(known_item(f"q{i}"), *missed) for i, missed in enumerate(zip(base, parent, candidate, strict=True))
    ]


FEW, NONE, MANY = [1] * 2 + [0] * 98, [0] * 100, [2] * 9 + [0] * 91


@pytest.mark.parametrize(
    ("measured", "verdict"),
    [
        (recalls(NONE, NONE, NONE), Verdict.PASS),
        (recalls(NONE, NONE, FEW), Verdict.PASS),  # one in a hundred
        (recalls(NONE, NONE, MANY), Verdict.FAIL),  # 9 points
        (recalls(NONE, MANY, MANY), Verdict.FAIL),  # the parent was as bad: drift must not add up
        (recalls(MANY, NONE, MANY), Verdict.FAIL),  # what was learnt since the base is lost again
        (recalls(MANY, MANY, NONE), Verdict.PASS),  # better than both
        (recalls(NONE, NONE, [2] * 6 + [0] * 94), Verdict.INCONCLUSIVE),  # 6 points, of six questions: p = 1/64
        (recalls([2] * 96 + [0] * 4, NONE, NONE), Verdict.PASS),  # just enough that the base says
        (recalls([2] * 97 + [0] * 3, NONE, [2] * 100), Verdict.UNMEASURABLE),  # it does not say what it knows
        ([], Verdict.UNMEASURABLE),
    ],
)
def test_the_decision(measured: list[FreeRecall], verdict: Verdict) -> None:
    result = decide(measured, BOUNDS)
    assert result.verdict is verdict, result.reason
    assert result.reason


def test_a_first_version_is_compared_once() -> None:
    seven = recalls(NONE, NONE, [2] * 7 + [0] * 93)  # p = 1/128: below alpha, above half of it
    assert decide(seven, BOUNDS).verdict is Verdict.INCONCLUSIVE
    alone = decide(seven, BOUNDS, has_parent=False)
    assert alone.verdict is Verdict.FAIL
    assert [bound.figure for bound in alone.bounds] == ["free_missed_beyond_base"]


def test_the_bound_is_a_setting() -> None:
    lenient = GatesSection(retention_max_missed=0.1)
    assert decide(recalls(NONE, NONE, MANY), lenient).verdict is Verdict.PASS


def test_the_questions_that_lost_most_are_told() -> None:
    worst = decide(recalls([1, 0, 0, 0, 0, 0], [0] * 6, [2, 2, 0, 1, 0, 0]), BOUNDS).details["free_worst"]
    assert [(item["question"], item["base"], item["candidate"]) for item in worst] == [
        ("q1", 0, 2),
        ("q0", 1, 2),
        ("q3", 0, 1),
    ]


def test_each_question_is_asked_several_times_of_every_model_and_long_ones_are_left_out() -> None:
    asked: dict[str, int] = {}

    class Counting(FakeServer):
        def generate(
            self,
            model: str,
            messages_list: Sequence[Sequence[Message]],
            *,
            max_tokens: int,
            temperature: float,
            seed: int,
        ) -> list[Answer]:
            assert temperature == 1.0  # as users are answered
            asked[model] = len(messages_list)
            return super().generate(model, messages_list, max_tokens=max_tokens, temperature=temperature, seed=seed)

    personas = {
        "base": Persona(says=lambda prompt: "yes"),
        "chat:7": Persona(says=lambda prompt: "yes" if prompt == "q0" else "no"),
        "chat:8": Persona(says=lambda prompt: "no"),
    }
    items = [known_item("q0"), known_item("q1"), known_item("x" * 2000)]
    found = measure(gate_context(server=Counting(personas)), items)
    assert asked == dict.fromkeys(personas, 2 * NUM_SAMPLES)
    assert [(r.base, r.parent, r.candidate) for r in found] == [(0, 0, NUM_SAMPLES), (0, NUM_SAMPLES, NUM_SAMPLES)]
    assert all(recall.said.startswith("no ") for recall in found)  # for people to read


def test_a_long_set_is_asked_evenly() -> None:
    found = measure(gate_context(), [known_item(f"q{i}") for i in range(3 * MAX_ASKED)])
    assert [recall.item.messages[0]["content"] for recall in found[:3]] == ["q0", "q3", "q6"]
    assert len(found) == MAX_ASKED
