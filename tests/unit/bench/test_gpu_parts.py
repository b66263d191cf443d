"""The parts of the GPU benchmark that need no model: what is learned, what counts, and what is told of a failure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.bench import ppo_task
from tests.bench.gpu import OURS, TRL, Trained, summarise
from tests.bench.gpu_task import Tuning, steady, texts
from tests.bench.ppo_task import Record, Shape, build_model

TASK = Tuning("model", "kto", batch_size=4, at_once=2, num_steps=3, prompt_tokens=5, answer_tokens=7)


def test_both_sides_learn_the_same_words_and_every_other_answer_is_liked() -> None:
    found = texts(TASK, vocab=50)
    assert found == texts(TASK, vocab=50) != texts(replace(TASK, seed=1), vocab=50)
    assert len(found) == 12
    assert {len(text.question.split()) for text in found} == {5}
    assert {len(text.answer.split()) for text in found} == {7}
    assert all(2 <= int(word[1:]) < 50 for text in found for word in text.answer.split())
    assert sum(text.liked for text in found) == 6
    assert TASK.tokens_per_step == 48


def test_steps_that_warm_up_do_not_count() -> None:
    assert steady([9.0, 9.0, 1.0, 2.0]) == [1.0, 2.0]
    assert steady([9.0, 8.0]) == [9.0, 8.0]


def trained(side: str, seconds: float, peak: int, predicted: int = 0) -> Trained:
    return Trained("8B", "kto", side, 100, Record([seconds] * 4, device_peak_bytes=peak, predicted_bytes=predicted))


def test_ours_is_compared_with_trl_and_with_its_own_estimate() -> None:
    outcome = summarise([trained(OURS, 1.0, 50, predicted=40), trained(TRL, 2.0, 100)])
    assert {bar.name: bar.value for bar in outcome.bars} == {
        "ours that did not end": 0.0,
        "estimate and peak, the larger over the smaller, worst": pytest.approx(1.25),  # too low is as wrong as too high
        "kto 8B, ours over TRL's: tokens/s": pytest.approx(2.0),
        "kto 8B, ours over TRL's: peak memory": pytest.approx(0.5),
    }
    assert all(bar.met for bar in outcome.bars)


def test_what_is_computed_before_the_first_step_counts_and_the_steps_stand_beside_it() -> None:
    """Ours takes the reference's log-probs beforehand, and TRL's in every step."""
    ours = Trained("8B", "kto", OURS, 100, Record([9.0, 9.0, 1.0, 1.0], training_s=40.0, device_peak_bytes=1))
    theirs = Trained("8B", "kto", TRL, 100, Record([3.0] * 4, training_s=20.0, device_peak_bytes=1))
    assert (ours.tokens_per_s, ours.steady_tokens_per_s) == (10.0, 100.0)
    kept = ours.to_json()["record"]
    assert (kept["tokens_per_s"], kept["steady_tokens_per_s"], kept["training_s"]) == (10.0, 100.0, 40.0)
    speeds = [bar.value for bar in summarise([ours, theirs]).bars if bar.name.endswith("tokens/s")]
    assert speeds == [pytest.approx(0.5)]


def test_the_process_that_wants_a_model_does_not_make_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it would hold the GPU's memory for as long as it lives."""

    def refused(directory: Path, shape: Shape) -> None:
        raise AssertionError("made here")

    monkeypatch.setattr(ppo_task, "make_model", refused)
    made = build_model(tmp_path / "model", Shape(hidden=8, intermediate=8, layers=1, heads=2, vocab=16))
    assert {"config.json", "model.safetensors", "tokenizer_config.json"} <= {path.name for path in made.iterdir()}
    before = (made / "model.safetensors").stat().st_mtime_ns
    assert (build_model(made, ppo_task.SMALL) / "model.safetensors").stat().st_mtime_ns == before  # once


def test_a_side_that_did_not_end_is_told_and_ours_counts_against_us() -> None:
    failed = Trained("8B", "ppo", TRL, 100, None, why="CUDA out of memory")
    told = summarise([trained(OURS, 1.0, 50), failed])
    assert told.notes == ("ppo 8B TRL did not end: CUDA out of memory",)
    assert told.bars[0].met
    assert not summarise([replace(failed, side=OURS)]).bars[0].met
