"""The teacher over HTTP: what is asked, what is kept, and what is said when it refuses."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from scion_adapters.errors import InvalidInputError, UnavailableError
from scion_adapters.sections.training import DistillSection
from scion_trainer.recipes.distill import usable
from scion_trainer.recipes.recipe import Example
from scion_trainer.stopping import RunInterruptedError
from scion_trainer.teacher import OpenAiTeacher, TaughtAnswer, ask_all, open_teacher, prompt_key
from tests.helpers.teacher import FakeTeacher, serve_teacher

PROMPTS = [[{"role": "user", "content": f"question {index}"}] for index in range(6)]


@pytest.fixture
def fake() -> Iterator[FakeTeacher]:
    with serve_teacher(FakeTeacher(says=lambda prompt: (f"answer to {prompt}", "stop"))) as teacher:
        yield teacher


def options(fake: FakeTeacher, **changes: Any) -> dict[str, Any]:
    section = DistillSection(teacher_url=fake.url, teacher_model="large", **changes)
    return section.model_dump(mode="json")


def ask(fake: FakeTeacher, file: Path, *, stop_after: int = 99, **changes: Any) -> list[str]:
    stop = lambda: len(fake.asked) >= stop_after  # noqa: E731 - one line
    with open_teacher(options(fake, **changes)) as teacher:
        answers = ask_all(teacher, PROMPTS, file, concurrency=2, seed=7, stop_requested=stop)
    return [answer.text for answer in answers]


def test_every_prompt_gets_its_answer_and_is_asked_once(fake: FakeTeacher, tmp_path: Path) -> None:
    file = tmp_path / "teacher.jsonl"
    expected = [f"answer to question {index}" for index in range(6)]
    assert ask(fake, file) == expected
    body = next(body for body in fake.asked if body["messages"] == PROMPTS[2])
    assert (body["model"], body["max_tokens"], body["temperature"], body["seed"]) == ("large", 512, 0.7, 9)
    assert ask(fake, file) == expected
    assert len(fake.asked) == 6  # nothing twice
    assert "question" not in file.read_text().replace("answer to question", "")  # prompts stay where they are


def test_a_stopped_run_asks_only_for_the_rest(fake: FakeTeacher, tmp_path: Path) -> None:
    file = tmp_path / "teacher.jsonl"
    with pytest.raises(RunInterruptedError):
        ask(fake, file, stop_after=3)
    num_kept = len(file.read_text().splitlines())
    with file.open("a") as out:
        out.write('{"prompt": "cut o')  # by a kill
    num_asked = len(fake.asked)
    assert 0 < num_kept < 6
    assert len(ask(fake, file)) == 6
    assert len(fake.asked) - num_asked == 6 - num_kept
    assert len(ask(fake, file)) == 6
    assert len(fake.asked) - num_asked == 6 - num_kept  # what followed the line that was cut off is there


class FirstIsRefused:
    """Answers every prompt but the first, which it refuses once all others were asked for."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._all_asked = threading.Event()
        self.kept_meanwhile = 0

    def answer(self, messages: Sequence[Mapping[str, Any]], *, seed: int) -> TaughtAnswer:
        if messages == PROMPTS[0]:
            assert self._all_asked.wait(timeout=30)
            self.kept_meanwhile = len(self._file.read_text().splitlines())
            raise UnavailableError("not this one")
        if messages == PROMPTS[-1]:
            self._all_asked.set()
        return TaughtAnswer("fine", True, "m")


def test_answers_are_kept_though_an_earlier_request_is_slow_and_fails(tmp_path: Path) -> None:
    file = tmp_path / "teacher.jsonl"
    teacher = FirstIsRefused(file)
    with pytest.raises(UnavailableError, match="not this one"):
        ask_all(teacher, PROMPTS, file, concurrency=2, seed=0, stop_requested=lambda: False)
    assert teacher.kept_meanwhile >= 4  # the last one may still be under way
    kept = {json.loads(line)["prompt"] for line in file.read_text().splitlines()}
    assert kept == {prompt_key(prompt) for prompt in PROMPTS[1:]}


@pytest.mark.parametrize(
    ("refusals", "error", "said"),
    [
        ([429, 503], None, ""),  # for load: asked again
        ([503] * 6, UnavailableError, r"answered 503 .*--resume"),
        ([500], UnavailableError, "answered 500"),
        ([404], InvalidInputError, r"answered 404 .*teacher_url and teacher_model"),
        ([401], InvalidInputError, r"answered 401 .*SCION_TEACHER_API_KEY"),
    ],
)
def test_refusals(fake: FakeTeacher, refusals: list[int], error: type[Exception] | None, said: str) -> None:
    fake.refusals = refusals
    waits: list[float] = []
    teacher = OpenAiTeacher(options(fake), sleep=waits.append)
    if error is None:
        assert teacher.answer(PROMPTS[0], seed=0).text == "answer to question 0"
        assert waits == [0.5, 1.0]
    else:
        with pytest.raises(error, match=said):
            teacher.answer(PROMPTS[0], seed=0)
    teacher.close()


def test_the_key_comes_from_the_environment(fake: FakeTeacher, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.key = "s3cret"
    monkeypatch.setenv("OTHER_KEY", "s3cret")
    with open_teacher(options(fake, api_key_env="OTHER_KEY")) as teacher:
        assert teacher.answer(PROMPTS[0], seed=0).finished
    with open_teacher(options(fake)) as teacher, pytest.raises(InvalidInputError, match="401"):
        teacher.answer(PROMPTS[0], seed=0)


def test_nobody_there_is_said_with_the_remedy(tmp_path: Path) -> None:
    nowhere = FakeTeacher(url="http://127.0.0.1:9")
    with pytest.raises(UnavailableError, match=r"does not answer .*teacher_url, and go on with --resume"):
        ask(nowhere, tmp_path / "teacher.jsonl")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (TaughtAnswer("fine.", True, "m"), None),
        (TaughtAnswer("  ", True, "m"), "empty"),
        (TaughtAnswer("and then", False, "m"), "cut_off"),
        (TaughtAnswer(" go away ", True, "m"), "same_as_disliked"),
        (TaughtAnswer("so " * 200, True, "m"), "looping"),
    ],
)
def test_only_answers_worth_learning_pass_the_checks(answer: TaughtAnswer, reason: str | None) -> None:
    kept, dropped = usable([Example(tuple(PROMPTS[0]), "go away", False)], [answer])
    assert (kept, dict(dropped)) == (([0], {}) if reason is None else ([], {reason: 1}))
