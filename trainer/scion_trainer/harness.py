"""Runs EleutherAI's lm-evaluation-harness against the live server, as a child process, and reads its scores.

Owns the command line and the files; it judges nothing. The harness asks for a version by its exact name; the keys that
allow that go in a file that only we can read, because everybody can read command lines.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from scion_adapters.errors import InvalidInputError, NotFoundError, UnavailableError
from scion_adapters.settings import Settings
from scion_trainer.server_client import EVALUATION_HEADER

_NUM_LINES_TOLD = 3


@dataclass(frozen=True, slots=True)
class TaskScores:
    """One task: the score of each document by its id, and what is scored. More is better, as `metric` is signed."""

    metric: str
    scores: Mapping[str, float]

    @property
    def mean(self) -> float:
        return sum(self.scores.values()) / len(self.scores)


def find_program(command: str) -> str:
    """The program's path: as given, on PATH, or beside this interpreter. Raises NotFoundError with the remedy."""
    beside = Path(sys.executable).parent / command
    found = shutil.which(command) or (str(beside) if beside.is_file() else None)
    if found is None:
        raise NotFoundError(
            f"{command!r} is not installed: pip install 'vllm-scion[eval]', or set gates.lm_eval_command to the "
            "program of another environment"
        )
    return found


def run_harness(
    settings: Settings, model: str, *, evaluation_key: str | None, max_length: int
) -> dict[str, TaskScores]:
    """The scores of `model` (a name that the server answers to) on gates.lm_eval_tasks, by task.

    Raises NotFoundError when the harness is not installed, UnavailableError when it fails or takes too long,
    InvalidInputError when what it wrote cannot be read.
    """
    gates = settings.gates
    program = find_program(gates.lm_eval_command)
    with tempfile.TemporaryDirectory(prefix="scion-lm-eval-") as folder:  # mode 0700
        directory = Path(folder)
        config = directory / "model.json"  # JSON is YAML
        config.write_text(json.dumps({"model_args": _model_args(settings, model, evaluation_key, max_length)}))
        command = [
            *(program, "run", "--config", str(config), "--model", "local-completions"),
            *("--tasks", ",".join(gates.lm_eval_tasks), "--output_path", str(directory / "out"), "--log_samples"),
            *(("--include_path", str(settings.path(gates.lm_eval_include))) if gates.lm_eval_include else ()),
            *gates.lm_eval_args,
        ]
        _run(command, _environment(settings), timeout_s=gates.lm_eval_timeout_s)
        return read_scores(directory / "out")


def read_scores(directory: Path) -> dict[str, TaskScores]:
    """What `--output_path` and `--log_samples` left below `directory`. Raises InvalidInputError."""
    results = sorted(directory.rglob("results_*.json"))
    if not results:
        raise InvalidInputError(f"lm_eval left no results in {directory}: see what it printed")
    better: Mapping[str, Any] = json.loads(results[-1].read_text("utf-8")).get("higher_is_better", {})
    tasks = {}
    for file in sorted(results[-1].parent.glob("samples_*.jsonl")):
        task = file.stem.removeprefix("samples_").rpartition("_")[0]  # then comes the date, which has no underscore
        if scores := _task_scores(_lines(file), better.get(task, {})):
            tasks[task] = scores
    if not tasks:
        raise InvalidInputError(f"{results[-1].name} of lm_eval has no task with a score per document")
    return tasks


def _task_scores(rows: Iterator[Mapping[str, Any]], better: Mapping[str, Any]) -> TaskScores | None:
    """By the first metric that says which way is better and has a number per document, and by the first filter."""
    metric, chosen_filter, scores = None, None, dict[str, float]()
    for row in rows:
        if metric is None:
            names = row.get("metrics") or list(better)
            metric = next((n for n in names if better.get(n) is not None and _is_number(row.get(n))), None)
            chosen_filter = row.get("filter")
        if metric is not None and row.get("filter") == chosen_filter and _is_number(row.get(metric)):
            scores[str(row["doc_id"])] = float(row[metric]) * (1.0 if better[metric] else -1.0)
    return None if metric is None else TaskScores(metric if better[metric] else f"-{metric}", scores)


def _lines(file: Path) -> Iterator[Mapping[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _model_args(settings: Settings, model: str, evaluation_key: str | None, max_length: int) -> dict[str, Any]:
    """Token ids are sent, as ours are, so that what is scored is what the harness cut. `header` replaces its own."""
    key = settings.trainer.api_key
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return {
        "model": model,
        "base_url": f"{settings.trainer.server_url.rstrip('/')}/v1/completions",
        "tokenizer_backend": "huggingface",
        "tokenizer": str(settings.base_path or settings.base.model),
        "tokenized_requests": True,
        "num_concurrent": settings.gates.concurrency,
        "max_length": max_length,
        "header": headers | ({EVALUATION_HEADER: evaluation_key} if evaluation_key else {}) or {"Accept": "*/*"},
    }


def _environment(settings: Settings) -> dict[str, str]:
    """Ours, but never through a proxy to our own server."""
    host = urlsplit(settings.trainer.server_url).hostname or ""
    known = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    hosts = ",".join(filter(None, (known, host)))
    return {**os.environ, "no_proxy": hosts, "NO_PROXY": hosts}


def _run(command: list[str], environment: Mapping[str, str], *, timeout_s: float) -> None:
    try:
        done = subprocess.run(
            command, env=dict(environment), capture_output=True, text=True, errors="replace", timeout=timeout_s
        )
    except subprocess.TimeoutExpired as error:
        raise UnavailableError(
            f"lm_eval did not end within {timeout_s:g} s: raise gates.lm_eval_timeout_s, or give it a --limit"
        ) from error
    except OSError as error:
        raise UnavailableError(f"{command[0]} cannot be started: {error.strerror}") from error
    if done.returncode != 0:
        told = " | ".join(line for line in done.stderr.strip().splitlines()[-_NUM_LINES_TOLD:])
        raise UnavailableError(f"lm_eval ended with {done.returncode}: {told or 'it said nothing'}")
