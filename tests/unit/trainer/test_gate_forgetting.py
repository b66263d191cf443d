"""The forgetting gate: general text and earlier versions' liked answers, candidate against champion."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from scion_adapters.errors import InvalidInputError
from scion_adapters.settings import Settings
from scion_trainer.gates.forgetting import ForgettingGate, Likelihood, decide, load_texts
from scion_trainer.gates.types import EarlierHoldout, Verdict
from tests.helpers.fake_server import Persona
from tests.helpers.gates import gate_context, question


def texts(num: int, drop: float, *, wobble: float = 0.0) -> list[Likelihood]:
    return [Likelihood(-1.0, -1.0 - drop - wobble * (-1) ** i) for i in range(num)]


PASS, FAIL, INCONCLUSIVE = Verdict.PASS, Verdict.FAIL, Verdict.INCONCLUSIVE


def whose(found: list[Likelihood], user: str) -> list[Likelihood]:
    return [replace(text, user=user) for text in found]


@pytest.mark.parametrize(
    ("known", "earlier", "verdict", "told"),
    [
        (texts(12, 0.0), {1: texts(30, 0.0)}, PASS, "within bounds"),
        (texts(12, 0.5), {1: texts(30, 0.0)}, FAIL, "general_drop 0.5"),
        (texts(12, 0.0), {1: texts(30, 0.5), 2: texts(30, 0.0)}, FAIL, "version_1_drop 0.5"),
        (texts(12, -0.5), {1: texts(30, -0.5)}, PASS, "within bounds"),  # better than before
        (texts(12, 0.0), {1: texts(10, 0.9)}, INCONCLUSIVE, "10 answers"),  # ten are told, and reject nothing
        (texts(12, 0.0), {1: texts(20, 0.25, wobble=3.0)}, INCONCLUSIVE, "chance"),  # up and down by three: chance
        (texts(12, 0.0), {1: texts(400, 0.25, wobble=2.0)}, FAIL, "version_1"),  # the same over many answers is not
        (texts(12, float("nan")), {}, FAIL, "general_drop nan"),
        (texts(12, 0.0), {1: texts(30, float("nan"))}, FAIL, "version_1_drop nan"),
        # Damage to a few general texts scatters, and is damage: one language of several, say.
        ([*texts(10, 0.0), *texts(2, 10.0)], {}, FAIL, "general_drop 1.67"),
        # One user's many answers are one user's.
        (texts(12, 0.0), {1: [*whose(texts(15, 1.0), "a"), *texts(6, 0.0)]}, PASS, "within bounds"),
        (texts(12, 0.0), {1: whose(texts(30, 1.0), "a")}, INCONCLUSIVE, "30 answers of 1 users"),
    ],
)
def test_the_decision(
    known: list[Likelihood], earlier: dict[int, list[Likelihood]], verdict: Verdict, told: str
) -> None:
    result = decide(known, earlier, num_general=12, max_drop=0.2)
    assert (result.verdict, told in result.reason) == (verdict, True), result.reason


def test_every_version_has_its_figure() -> None:
    result = decide(texts(12, 0.1), {1: texts(30, 0.1), 3: texts(8, 0.2)}, num_general=12, max_drop=0.2)
    assert result.figures["version_1_drop"] == pytest.approx(0.1)
    assert result.figures["version_3_drop"] == pytest.approx(0.2)
    assert result.figures["version_3_answers"] == 8
    assert result.figures["general_perplexity"] == pytest.approx(2.718281828**1.1)


def test_a_base_that_reads_no_english_and_no_earlier_version() -> None:
    result = decide([], {}, num_general=12, max_drop=0.2)
    assert result.verdict is Verdict.UNMEASURABLE
    assert "gates.general_file" in result.reason


def liked_before(number: int = 3) -> EarlierHoldout:
    rows = [question(f"old {i}", answer="good", liked=i % 2 == 0, user_hash=f"u{i % 10}") for i in range(60)]
    return EarlierHoldout(number, tuple(rows))


def test_what_users_liked_of_an_earlier_version_must_stay_likely() -> None:
    forgot = Persona(finds=lambda prompt, before, token: -2.0 if chr(token) in "good" else -1.0)
    result = ForgettingGate().run(gate_context({"chat:8": forgot}, earlier=[liked_before()]))
    assert result.verdict is Verdict.FAIL
    assert "version_3_drop" in result.reason
    assert result.figures["version_3_answers"] == 30  # the liked half


def test_the_champion_is_what_it_is_compared_with() -> None:
    forgot = Persona(finds=lambda prompt, before, token: -2.0)
    result = ForgettingGate().run(gate_context({"chat:7": forgot, "chat:8": forgot}, earlier=[liked_before()]))
    assert result.verdict is Verdict.PASS


def test_a_text_that_the_base_cannot_read_cannot_be_forgotten() -> None:
    deaf = Persona(finds=lambda prompt, before, token: -9.0)
    mute = Persona(finds=lambda prompt, before, token: -12.0)
    result = ForgettingGate().run(gate_context({"base": deaf, "chat:8": mute}))
    assert (result.verdict, result.figures["general_known"]) == (Verdict.UNMEASURABLE, 0)
    known = ForgettingGate().run(gate_context({"chat:8": mute}))
    assert known.verdict is Verdict.FAIL


def test_general_text_of_ones_own(tmp_path: Path) -> None:
    assert len(load_texts(Settings())) == 12
    (tmp_path / "own.txt").write_text("One\nparagraph.\n\n\nAnother one.\n")
    assert load_texts(Settings.model_validate({"home": tmp_path, "gates": {"general_file": "own.txt"}})) == (
        "One paragraph.",
        "Another one.",
    )
    (tmp_path / "empty.txt").write_text("\n\n")
    for name in ("empty.txt", "missing.txt"):
        with pytest.raises(InvalidInputError, match="general_file"):
            load_texts(Settings.model_validate({"home": tmp_path, "gates": {"general_file": name}}))
