"""A red-team suite: JSON lines of probes, each a prompt, its category and what the answer must or must not be.

Owns the format and its errors, which name file, line and remedy. It knows nothing of servers or of verdicts.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from scion_adapters.errors import InvalidInputError
from scion_adapters.settings import Settings
from scion_trainer.red_team.checks import find_check
from scion_trainer.server_client import Message

_FIELD = "gates.red_team_suite"
_KEYS = ("id", "category", "prompt", "messages", "checks")
_ROLES = ("system", "user", "assistant")
_LABEL = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Probe:
    """One conversation, whose next answer must pass every check: (kind, argument as its reader gave it)."""

    id: str
    category: str
    messages: tuple[Message, ...]
    checks: tuple[tuple[str, Any], ...]

    def fault(self, answer: str) -> tuple[str, str] | None:
        """The first check that the answer fails, and what is wrong with it."""
        for kind, argument in self.checks:
            if (wrong := find_check(kind).fault(answer, argument)) is not None:
                return kind, wrong
        return None


@dataclass(frozen=True, slots=True)
class Suite:
    """`digest` is that of the text: findings remember which suite they come from."""

    origin: str
    digest: str
    probes: tuple[Probe, ...]


def load_suite(settings: Settings, file: str | Path | None = None) -> Suite:
    """`file`, else the configured one, else the suite that ships with this package.

    Raises InvalidInputError naming file and line.
    """
    named = file if file is not None else settings.gates.red_team_suite
    if named is None:
        text = (resources.files("scion_trainer") / "data" / "red_team.jsonl").read_text("utf-8")
        return parse_suite(text, origin="the built-in suite")
    path = Path(file) if file is not None else settings.path(str(named))
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise InvalidInputError(f"the red-team suite {path} cannot be read: {error.strerror}", field=_FIELD) from error
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"the red-team suite {path} is not UTF-8: {error}; save it as UTF-8") from error
    return parse_suite(text, origin=str(path))


def parse_suite(text: str, *, origin: str) -> Suite:
    """One JSON object per line; empty lines and lines that begin with # are left out."""
    probes: dict[str, Probe] = {}
    for number, line in enumerate(text.split("\n"), start=1):  # JSON's strings may hold other ends of lines
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            probe = _probe(json.loads(line))
            if probe.id in probes:
                raise ValueError(f"the id {probe.id!r} is taken by an earlier line: give each probe its own")
        except (ValueError, InvalidInputError) as error:  # json's own error is a ValueError
            raise InvalidInputError(f"{origin}, line {number}: {error}", field=_FIELD) from error
        probes[probe.id] = probe
    if not probes:
        raise InvalidInputError(f"{origin} has no probes: add a line, or leave {_FIELD} unset", field=_FIELD)
    digest = f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
    return Suite(origin, digest, tuple(probes.values()))


def _probe(row: Any) -> Probe:
    """Raises ValueError or InvalidInputError with what is wrong and what was expected."""
    if not isinstance(row, Mapping):
        raise ValueError('expected an object: {"id": "…", "category": "…", "prompt": "…", "checks": {…}}')
    if unknown := [key for key in row if key not in _KEYS]:
        raise ValueError(f"unknown field {unknown[0]!r}; known fields are {', '.join(_KEYS)}")
    checks = row.get("checks")
    if not isinstance(checks, Mapping) or not checks:
        raise ValueError('checks: expected an object with at least one check, such as {"must_not_contain": "…"}')
    return Probe(
        id=_label(row, "id"),
        category=_label(row, "category"),
        messages=_messages(row),
        checks=tuple((kind, _argument(kind, value)) for kind, value in checks.items()),
    )


def _argument(kind: str, value: Any) -> Any:
    check = find_check(kind)
    try:
        return check.read(value)
    except ValueError as error:
        raise ValueError(f"checks.{kind}: expected {error}, got {json.dumps(value)[:80]}") from error


def _label(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not _LABEL.fullmatch(value):
        raise ValueError(f"{key}: expected 1 to 64 of a-z, 0-9, `.`, `_`, `-`, got {json.dumps(value)[:80]}")
    return value


def _messages(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """A prompt is one message of the user."""
    if ("prompt" in row) == ("messages" in row):
        raise ValueError("expected either prompt (a text) or messages (a list), and not both")
    messages = [{"role": "user", "content": row["prompt"]}] if "prompt" in row else row["messages"]
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages: expected a list with at least one message")
    for message in messages:
        if not isinstance(message, Mapping) or set(message) != {"role", "content"} or message["role"] not in _ROLES:
            raise ValueError(f'messages: expected {{"role": "{"|".join(_ROLES)}", "content": "…"}}')
        if not isinstance(message["content"], str) or not message["content"].strip():
            raise ValueError("prompt and messages need text")
    if messages[-1]["role"] != "user":
        raise ValueError("the last message must be the user's: its answer is what is checked")
    return tuple(dict(message) for message in messages)
