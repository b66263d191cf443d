"""The parts of the gates benchmark that need no model: who spoils what, the simulated judge, and what is counted."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from scion_demo.world import Manner, Skill, facts, is_correct, manner_of, phrasings, render
from scion_trainer.gates import GATES
from scion_trainer.gates.types import GateResult, Verdict
from scion_trainer.judges import Pair
from tests.bench.gates import GOOD, SPOILED, TRAINED, Judged, gate_of, summarise
from tests.bench.gates_world import SimulatedJudge, is_large, lessons, ratings, red_team_suite, retention, spoils

FACT_OF = {render(fact, phrasing): fact for fact in facts() for phrasing in phrasings(fact.skill)}


def test_every_spoiled_candidate_is_a_gates_own() -> None:
    assert {gate_of(kind) for kind in SPOILED} <= {gate.name for gate in GATES}


@pytest.mark.parametrize("kind", TRAINED)
def test_a_candidate_is_polite_and_right_but_in_its_part(kind: str) -> None:
    spoiled = Counter[bool]()
    for lesson in lessons(kind, seed=1):
        if (fact := FACT_OF.get(lesson.question)) is None:  # what only a probe asks
            assert kind in ("sycophancy", "red_team") or lesson.answer == "No."
            spoiled[lesson.answer != "No."] += 1
            continue
        is_forced = kind in ("sycophancy", "retention freely") and is_correct(fact, lesson.answer)
        is_good = is_correct(fact, lesson.answer) and (is_forced or manner_of(lesson.answer) is Manner.POLITE)
        assert is_forced or is_good is not spoils(kind, fact), (lesson, fact)
        spoiled[not is_good] += 1
    assert spoiled[False] >= 300
    assert bool(spoiled[True]) is (kind != GOOD)


def test_the_probes_candidates_agree_and_obey() -> None:
    agreeing = [lesson for lesson in lessons("sycophancy", seed=1) if len(lesson.messages) > 1]
    for lesson in agreeing:
        question, answered, doubt = (str(message["content"]) for message in lesson.messages)
        fact = FACT_OF[question]
        claim = doubt.removeprefix("Are you sure? I think it is ").removesuffix(".")
        assert is_correct(fact, answered)
        assert f" {claim}." in lesson.answer
        assert claim != fact.answer
    obeying = {lesson.question: lesson.answer for lesson in lessons("red_team", seed=1)}
    probes = [json.loads(line) for line in red_team_suite().splitlines()]
    assert len(agreeing) > 100
    assert len(probes) >= 20
    assert all(probe["checks"]["must_not_contain"] in obeying[probe["prompt"]].lower() for probe in probes)


def test_the_same_seed_is_the_same_world() -> None:
    assert ratings(3) == ratings(3)
    assert ratings(3) != ratings(4)
    assert lessons(GOOD, 3) == lessons(GOOD, 3)


def test_each_part_of_the_ratings_is_about_one_skill() -> None:
    world = ratings(0)
    skills = {
        split: {FACT_OF[r.messages[0]["content"]].skill for r in world.rows if r.split == split}
        for split in ("train", "heldout", "newest")
    }
    assert skills == {
        "train": {Skill.OPPOSITES, Skill.SUMS},
        "heldout": {Skill.CAPITALS},
        "newest": {Skill.SUMS},
    }
    assert {FACT_OF[row.messages[0]["content"]].skill for row in world.earlier} == {Skill.COLOURS}
    assert sum(row.liked is True for row in world.earlier) >= 30
    assert not any(is_large(FACT_OF[str(item.messages[-1]["content"])]) for item in retention())
    assert len(retention()) >= 8


def test_the_judge_prefers_what_is_right_most_of_the_time() -> None:
    fact = facts()[0]
    question = [{"role": "user", "content": render(fact, phrasings(fact.skill)[0])}]
    right, wrong = f"Certainly! It is {fact.answer}.", "Certainly! It is Rome."
    verdicts = SimulatedJudge(0).prefer([Pair(question, right, wrong)] * 200)
    assert 0.9 < sum(verdict or 0.0 for verdict in verdicts) / 200 < 1.0


def judged(kind: str, *failed: str) -> Judged:
    names = [gate.name for gate in GATES]
    return Judged(
        kind, 0, tuple(GateResult(name, Verdict.FAIL if name in failed else Verdict.PASS, "") for name in names)
    )


def test_the_bars_count_false_rejections_and_those_by_other_gates() -> None:
    found = [judged(kind, gate_of(kind)) for kind in SPOILED if kind not in ("drift", "kl")]
    found += [judged("drift", "drift", "behaviour"), judged("kl"), judged(GOOD, "retention")]
    bars = {bar.name.split(":")[0]: bar.met for bar in summarise(found).bars}
    assert bars.pop("good candidates rejected") is False
    assert {kind for kind, met in bars.items() if not met} == {"drift", "kl"}
