"""lm-evaluation-harness as a gate: how it is started, what is read of what it leaves, and the verdict.

The harness is a small program here that writes files in its format (read off version 0.4.13) and notes how it was
called.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from scion_adapters.errors import InvalidInputError, NotFoundError, UnavailableError
from scion_adapters.sections.gates import GatesSection
from scion_adapters.settings import Settings
from scion_trainer.gates.lm_eval import LmEvalGate, decide
from scion_trainer.gates.types import Verdict
from scion_trainer.harness import TaskScores, find_program, read_scores, run_harness
from tests.helpers.gates import gate_context

PROGRAM = """#!{python}
import json, os, pathlib, sys
option = lambda name: sys.argv[sys.argv.index(name) + 1]
arguments = json.loads(pathlib.Path(option("--config")).read_text())["model_args"]
note = {{"argv": sys.argv[1:], "mode": os.stat(option("--config")).st_mode & 0o777, "model_args": arguments}}
note["folder_mode"] = os.stat(pathlib.Path(option("--config")).parent).st_mode & 0o777
note["no_proxy"] = os.environ["no_proxy"]
with open({notes!r}, "a") as file:
    file.write(json.dumps(note) + "\\n")
out = pathlib.Path(option("--output_path")) / "name"
out.mkdir(parents=True)
right = {right}[arguments["model"]]
better = {{"higher_is_better": {{"my_task": {{"acc": True}}}}}}
(out / "results_2026-01-01T00-00-00.0.json").write_text(json.dumps(better))
with open(out / "samples_my_task_2026-01-01T00-00-00.0.jsonl", "w") as file:
    for i in range(40):
        row = {{"doc_id": i, "filter": "none", "metrics": ["acc"], "acc": float(i < right)}}
        file.write(json.dumps(row) + "\\n")
"""


def make_program(directory: Path, **right: int) -> dict[str, Any]:
    """The gates' settings for a harness that finds so many of 40 documents right; keys are `chat_8` for `chat:8`."""
    program = directory / "lm_eval"
    known = {name.replace("_", ":"): number for name, number in right.items()}
    program.write_text(PROGRAM.format(python=sys.executable, notes=str(directory / "notes"), right=known))
    program.chmod(0o755)
    return {"lm_eval_command": str(program), "lm_eval_tasks": ["my_task"]}


def notes(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "notes").read_text().splitlines()]


def scores(values: Sequence[float]) -> dict[str, TaskScores]:
    return {"my_task": TaskScores("acc", {str(i): value for i, value in enumerate(values)})}


def right(count: int, *, first: int = 0) -> list[float]:
    return [float(first <= i < first + count) for i in range(40)]


@pytest.mark.parametrize(
    ("candidate", "parent", "verdict"),
    [
        (right(20), right(20), Verdict.PASS),
        (right(30), right(20), Verdict.PASS),
        (right(10), right(20), Verdict.FAIL),
        (right(17), right(20), Verdict.INCONCLUSIVE),  # three documents: p = 1/8
        (right(20, first=10), right(20), Verdict.PASS),  # other documents, as many
        ([0.4] * 40, [0.41] * 40, Verdict.PASS),  # all a little worse, less than is allowed
        ([0.3] * 40, [0.4] * 40, Verdict.FAIL),  # scores need not be 0 or 1
    ],
)
def test_the_decision(candidate: list[float], parent: list[float], verdict: Verdict) -> None:
    result = decide(scores(candidate), scores(parent), bounds=GatesSection())
    assert result.verdict is verdict, result.reason
    assert result.figures["my_task_drop"] == pytest.approx((sum(parent) - sum(candidate)) / 40)


@pytest.mark.parametrize(
    ("candidate", "parent", "verdict", "documents"),
    [
        ([0.0] * 39 + [math.nan], [1.0] * 40, Verdict.FAIL, 40),  # one document without a score hides nothing
        ([math.nan] * 40, right(20), Verdict.FAIL, 40),  # what only the candidate has no score for it has failed
        (right(40), [math.nan] * 20 + [1.0] * 20, Verdict.PASS, 20),  # what the parent has none for does not count
        (right(40), [math.nan] * 40, Verdict.UNMEASURABLE, None),
    ],
)
def test_scores_that_are_no_numbers(
    candidate: list[float], parent: list[float], verdict: Verdict, documents: int | None
) -> None:
    result = decide(scores(candidate), scores(parent), bounds=GatesSection())
    assert (result.verdict, result.figures.get("my_task_documents")) == (verdict, documents), result.reason


def test_without_a_common_document_nothing_is_judged() -> None:
    other = {"your_task": TaskScores("acc", {"0": 1.0})}
    assert decide(scores(right(1)), other, bounds=GatesSection()).verdict is Verdict.UNMEASURABLE


@pytest.mark.parametrize(("candidate", "verdict"), [(20, Verdict.PASS), (5, Verdict.FAIL)])
def test_candidate_and_parent_are_asked_by_name_through_the_program(
    tmp_path: Path, candidate: int, verdict: Verdict
) -> None:
    gates = make_program(tmp_path, chat_8=candidate, chat_7=20)
    keys = {"chat:8": "key-8", "chat:7": "key-7"}
    result = LmEvalGate().run(gate_context(gates=gates, evaluation_keys=keys, max_length=256))
    assert result.verdict is verdict, result.reason
    ours, theirs = notes(tmp_path)
    assert (ours["model_args"]["model"], theirs["model_args"]["model"]) == ("chat:8", "chat:7")
    assert ours["model_args"]["header"]["X-Scion-Evaluation"] == "key-8"
    assert theirs["model_args"]["header"]["X-Scion-Evaluation"] == "key-7"
    assert ours["model_args"]["max_length"] == 256


def test_keys_are_in_a_private_file_and_not_on_the_command_line(tmp_path: Path) -> None:
    settings = Settings.model_validate(
        {
            "gates": {**make_program(tmp_path, chat_8=1), "lm_eval_args": ["--limit", "5"], "lm_eval_include": "tasks"},
            "trainer": {"api_key": "sk-secret", "server_url": "http://gpu-host:9000/"},
            "home": tmp_path,
        }
    )
    run_harness(settings, "chat:8", evaluation_key="hush", max_length=512)
    (note,) = notes(tmp_path)
    assert note["folder_mode"] == 0o700
    assert "hush" not in str(note["argv"])
    assert "sk-secret" not in str(note["argv"])
    assert note["model_args"]["header"] == {"Authorization": "Bearer sk-secret", "X-Scion-Evaluation": "hush"}
    assert note["model_args"]["base_url"] == "http://gpu-host:9000/v1/completions"
    assert "gpu-host" in note["no_proxy"].split(",")
    assert note["argv"][-4:] == ["--include_path", str(tmp_path / "tasks"), "--limit", "5"]


def test_without_tasks_it_does_not_run(tmp_path: Path) -> None:
    gates = {**make_program(tmp_path), "lm_eval_tasks": []}
    result = LmEvalGate().run(gate_context(gates=gates))
    assert (result.verdict, (tmp_path / "notes").exists()) == (Verdict.UNMEASURABLE, False)
    assert "gates.lm_eval_tasks" in result.reason


def test_without_the_harness_the_remedy_is_told() -> None:
    result = LmEvalGate().run(gate_context(gates={"lm_eval_tasks": ["x"], "lm_eval_command": "lm_eval_is_not_here"}))
    assert result.verdict is Verdict.UNMEASURABLE
    assert "pip install 'vllm-scion[eval]'" in result.reason


def test_the_program_beside_the_interpreter_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(NotFoundError):
        find_program("lm_eval")
    (tmp_path / "lm_eval").touch()
    assert find_program("lm_eval") == str(tmp_path / "lm_eval")


@pytest.mark.parametrize(
    ("script", "timeout_s", "says"),
    [
        ("echo first >&2; echo 'KeyError: my_task' >&2; exit 3", 60.0, "ended with 3: first | KeyError: my_task"),
        ("while :; do :; done", 0.2, "gates.lm_eval_timeout_s"),
    ],
)
def test_when_it_fails_it_is_not_the_candidates_fault(tmp_path: Path, script: str, timeout_s: float, says: str) -> None:
    program = tmp_path / "lm_eval"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    gates = {"lm_eval_tasks": ["my_task"], "lm_eval_command": str(program), "lm_eval_timeout_s": timeout_s}
    settings = Settings.model_validate({"gates": gates})
    with pytest.raises(UnavailableError) as raised:
        run_harness(settings, "chat:8", evaluation_key=None, max_length=512)
    assert says in str(raised.value)
    assert LmEvalGate().run(gate_context(gates=gates)).verdict is Verdict.UNMEASURABLE


def write_samples(directory: Path, better: dict[str, Any], **tasks: list[dict[str, Any]]) -> Path:
    (directory / "name").mkdir()
    (directory / "name" / "results_2026-01-01T00-00-00.1.json").write_text(json.dumps({"higher_is_better": better}))
    for task, rows in tasks.items():
        file = directory / "name" / f"samples_{task}_2026-01-01T00-00-00.1.jsonl"
        file.write_text("\n".join(json.dumps(row) for row in rows))
    return directory


def test_scores_are_read_with_their_direction_and_one_filter(tmp_path: Path) -> None:
    write_samples(
        tmp_path,
        {"with_under_score": {"em": True, "f1": True}, "bits": {"bits": False}, "odd": {"thing": None}},
        with_under_score=[
            {"doc_id": 0, "filter": "strict", "metrics": ["em", "f1"], "em": 1.0, "f1": 0.5},
            {"doc_id": 0, "filter": "loose", "metrics": ["em", "f1"], "em": 0.0, "f1": 0.5},
            {"doc_id": 1, "filter": "strict", "metrics": ["em", "f1"], "em": 0.0, "f1": 0.5},
        ],
        bits=[{"doc_id": 0, "filter": "none", "metrics": ["bits"], "bits": 2.5}],
        odd=[{"doc_id": 0, "filter": "none", "metrics": ["thing"], "thing": [1, 2]}],
    )
    assert read_scores(tmp_path) == {
        "with_under_score": TaskScores("em", {"0": 1.0, "1": 0.0}),
        "bits": TaskScores("-bits", {"0": -2.5}),
    }


def test_no_results_and_no_scores_say_so(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="left no results"):
        read_scores(tmp_path)
    write_samples(tmp_path, {}, my_task=[{"doc_id": 0, "filter": "none", "metrics": ["acc"], "acc": 1.0}])
    with pytest.raises(InvalidInputError, match="no task with a score"):
        read_scores(tmp_path)
