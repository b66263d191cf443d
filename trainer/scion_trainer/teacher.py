"""A teacher: a model behind an OpenAI-compatible endpoint that answers prompts, once each.

Owns the requests, and the file in which answers are kept as they come: a run that goes on asks only for what is
missing. It knows nothing of what is done with the answers.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx

from scion_adapters.errors import InvalidInputError, UnavailableError
from scion_trainer.stopping import RunInterruptedError

Messages = Sequence[Mapping[str, Any]]
ANSWER_TIMEOUT_S = 300.0
MAX_TRIES = 6
RETRY_WAIT_S = 0.5
"""Doubled after every refusal for load (429, 502, 503, 504): about 15 seconds in all."""
_LOAD = (429, 502, 503, 504)


@dataclass(frozen=True, slots=True)
class TaughtAnswer:
    """What the teacher said. `finished` is false when it was cut off; `model` is the name that the endpoint gave."""

    text: str
    finished: bool
    model: str


class Teacher(Protocol):
    def answer(self, messages: Messages, *, seed: int) -> TaughtAnswer:
        """One answer. Raises UnavailableError or InvalidInputError."""
        ...


class OpenAiTeacher:
    """`Teacher` over HTTP. Thread-safe."""

    def __init__(
        self,
        options: Mapping[str, Any],
        *,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`options` are those of trainer.distill. The key comes from the environment and is never written anywhere."""
        self._options = options
        self._sleep = sleep
        key = os.environ.get(str(options["api_key_env"]), "")
        self._url = str(options["teacher_url"]).rstrip("/").removesuffix("/v1") + "/v1/chat/completions"
        self._http = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(ANSWER_TIMEOUT_S, connect=10.0),
            transport=transport,
        )

    def close(self) -> None:
        self._http.close()

    def answer(self, messages: Messages, *, seed: int) -> TaughtAnswer:
        body = {
            "model": self._options["teacher_model"],
            "messages": [dict(message) for message in messages],
            "max_tokens": self._options["max_tokens"],
            "temperature": self._options["temperature"],
            "seed": seed,
        }
        response = self._post(body)
        try:
            choice = response.json()["choices"][0]
            text = choice["message"]["content"] or ""
            return TaughtAnswer(str(text), choice["finish_reason"] == "stop", str(response.json().get("model", "")))
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise InvalidInputError(
                f"the teacher at {self._url} gave no chat completion ({response.text[:120]!r}): "
                "set trainer.distill.teacher_url to an OpenAI-compatible endpoint",
                field="trainer.distill.teacher_url",
            ) from error

    def _post(self, body: Mapping[str, Any]) -> httpx.Response:
        wait_s = RETRY_WAIT_S
        for attempt in range(1, MAX_TRIES + 1):
            try:
                response = self._http.post(self._url, json=body)
            except httpx.HTTPError as error:
                raise UnavailableError(
                    f"the teacher at {self._url} does not answer ({type(error).__name__}: {error}); start it, or "
                    "correct trainer.distill.teacher_url, and go on with --resume"
                ) from error
            if response.status_code not in _LOAD or attempt == MAX_TRIES:
                break
            self._sleep(wait_s)
            wait_s *= 2
        said = response.text[:200]
        if response.status_code in (401, 403):
            raise InvalidInputError(
                f"the teacher at {self._url} answered {response.status_code} ({said}): set the environment variable "
                f"{self._options['api_key_env']} to a key that may use {self._options['teacher_model']!r}",
                field="trainer.distill.api_key_env",
            )
        if response.status_code in _LOAD or response.status_code >= 500:
            raise UnavailableError(
                f"the teacher at {self._url} answered {response.status_code} ({said}): go on later with --resume, or "
                "lower trainer.distill.concurrency"
            )
        if response.status_code != 200:
            raise InvalidInputError(
                f"the teacher at {self._url} answered {response.status_code} ({said}): check "
                "trainer.distill.teacher_url and teacher_model",
                field="trainer.distill.teacher_url",
            )
        return response


@contextmanager
def open_teacher(options: Mapping[str, Any]) -> Iterator[Teacher]:
    """The configured teacher."""
    teacher = OpenAiTeacher(options)
    try:
        yield teacher
    finally:
        teacher.close()


def ask_all(
    teacher: Teacher,
    prompts: Sequence[Messages],
    file: Path,
    *,
    concurrency: int,
    seed: int,
    stop_requested: Callable[[], bool],
) -> list[TaughtAnswer]:
    """One answer for each prompt, in their order. Answers already in `file` are not asked for again.

    Raises what the teacher raises first, and RunInterruptedError when stopped. `file` then has every answer that came,
    in the order in which they came, those to requests that were under way included: they may have been paid for.
    """
    known = dict(_read(file))
    missing = [(index, prompt) for index, prompt in enumerate(prompts) if prompt_key(prompt) not in known]

    lock = threading.Lock()

    def ask(index: int, prompt: Messages) -> None:
        if stop_requested():
            raise RunInterruptedError("stopped while the teacher answered; its answers are kept")
        key, answer = prompt_key(prompt), teacher.answer(prompt, seed=seed + index)
        with lock:
            known[key] = answer
            out.write(json.dumps({"prompt": key, **asdict(answer)}) + "\n")
            out.flush()

    # The file is closed last: what is under way when one request fails is still written.
    with (
        file.open("a", encoding="utf-8") as out,
        ThreadPoolExecutor(max_workers=concurrency, thread_name_prefix="teacher") as pool,
    ):
        if _is_cut_off(file):
            out.write("\n")
        futures = [pool.submit(ask, index, prompt) for index, prompt in missing]
        try:
            for future in as_completed(futures):
                future.result()
        finally:
            for future in futures:
                future.cancel()
    return [known[prompt_key(prompt)] for prompt in prompts]


def prompt_key(messages: Messages) -> str:
    """A digest of the messages: the file of answers repeats no prompt of a user's."""
    return hashlib.sha256(json.dumps([dict(message) for message in messages], sort_keys=True).encode()).hexdigest()


def _is_cut_off(file: Path) -> bool:
    """Whether the last line has no end: what is appended to it would be lost with it."""
    content = file.read_bytes()
    return bool(content) and not content.endswith(b"\n")


def _read(file: Path) -> Iterable[tuple[str, TaughtAnswer]]:
    if not file.is_file():
        return
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
            yield entry.pop("prompt"), TaughtAnswer(**entry)
        except (ValueError, KeyError, TypeError):
            continue  # cut off by a kill
