"""Completions that were served: the record of one, and the table that holds them. Knows not where records come from.

The store is idempotent, because the journal delivers at least once: a record that comes again changes nothing, and
another record under a completion id that is taken (clients can choose ids) is reported, never merged.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from scion_adapters.clock import new_id
from scion_adapters.database import Database
from scion_adapters.errors import InvalidInputError, NotFoundError
from scion_adapters.tables import completions
from scion_feedback.votes import adopt_early_votes, adopt_in

_MAX_SHORT_TEXT = 255


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRecord:
    """One answer as it was served; the fields are the columns of `completions`. Times are Unix seconds."""

    id: str
    adapter: str
    number: int
    probability: float
    requested_model: str
    route: str
    request: Mapping[str, Any]
    choices: Sequence[Mapping[str, Any]]
    latency_ms: float
    created_at: float
    stream: bool = False
    rollout_id: str | None = None
    user_hash: str | None = None
    conversation: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    finish_reason: str | None = None
    first_token_ms: float | None = None
    record_id: str = field(default_factory=lambda: new_id("rec"))

    def to_json(self) -> dict[str, Any]:
        """The JSON-able form that the journal holds. `from_json` is its inverse."""
        return {name: getattr(self, name) for name in _FIELDS}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CompletionRecord:
        """Raises InvalidInputError when `data` is not a record; keys that a newer program added are ignored."""
        try:
            return cls(**{name: data[name] for name in _FIELDS if name in data})
        except (TypeError, KeyError) as error:
            raise InvalidInputError(f"not a completion record: {error}") from error


_FIELDS = tuple(f.name for f in dataclasses.fields(CompletionRecord))


@dataclass(frozen=True, slots=True)
class InsertResult:
    """How many records were new, were there already, or used the id of another completion."""

    new: int
    redelivered: int
    conflicting: int


class CompletionStore:
    """The `completions` table."""

    def __init__(self, database: Database) -> None:
        self._database = database
        dialect = sqlite if database.is_sqlite else postgresql
        self._insert = dialect.insert(completions).on_conflict_do_nothing().execution_options(preserve_rowcount=True)

    def insert(self, records: Sequence[CompletionRecord]) -> InsertResult:
        """Store `records` durably, in one transaction. Gives votes that came before their completion its user.

        A record that is refused because its id is taken gives its user to nobody.

        Raises InvalidInputError when a record can never be stored (then none was), UnavailableError when another try
        may succeed.
        """
        if not records:
            return InsertResult(0, 0, 0)
        rows = [_row(record) for record in records]
        try:
            with self._database.write() as connection:
                new = connection.execute(self._insert, rows).rowcount  # both drivers add up those of an executemany
                kept = records if new == len(rows) else _kept(connection, records)
                users = {record.id: record.user_hash for record in kept if record.user_hash is not None}
                if self._database.is_sqlite:
                    adopt_in(connection, users)
        except (sa.exc.DataError, sa.exc.IntegrityError) as error:
            raise InvalidInputError(f"a completion cannot be stored: {error.orig}") from error
        except (ValueError, TypeError, OverflowError) as error:  # psycopg's own, while it writes JSON
            raise InvalidInputError(f"a completion cannot be stored: {error}") from error
        except sa.exc.StatementError as error:
            if isinstance(error.orig, ValueError | TypeError | OverflowError):
                raise InvalidInputError(f"a completion cannot be stored: {error.orig}") from error
            raise
        if not self._database.is_sqlite:
            adopt_early_votes(self._database, users)
        return InsertResult(new, redelivered=len(kept) - new, conflicting=len(records) - len(kept))

    def get(self, completion_id: str) -> CompletionRecord:
        """The record with that completion id. Raises NotFoundError."""
        with self._database.read() as connection:
            row = connection.execute(sa.select(completions).where(completions.c.id == completion_id)).mappings().first()
        if row is None:
            raise NotFoundError(f"no completion {completion_id!r} was recorded")
        return CompletionRecord.from_json(dict(row))


def _kept(connection: sa.Connection, records: Sequence[CompletionRecord]) -> list[CompletionRecord]:
    """Those of `records` that the table holds, now or since an earlier delivery; the others reuse a taken id.

    Runs in the inserting transaction.
    """
    ids = {record.id for record in records}
    statement = sa.select(completions.c.id, completions.c.record_id).where(completions.c.id.in_(ids))
    stored = {row.id: row.record_id for row in connection.execute(statement)}
    return [record for record in records if stored[record.id] == record.record_id]


def _row(record: CompletionRecord) -> dict[str, Any]:
    """The table row of `record`; what clients chose freely is made storable everywhere."""
    if not record.id or len(record.id) > _MAX_SHORT_TEXT or _storable(record.id) != record.id:
        raise InvalidInputError(
            f"completion id {record.id[:80]!r}… cannot be stored: expected 1 to 255 characters of text"
        )
    row = record.to_json()
    row["requested_model"] = _shorten(record.requested_model)
    row["conversation"] = None if record.conversation is None else _shorten(record.conversation)
    return row


def _shorten(text: str) -> str:
    """`text` within the column's length; different long texts stay different."""
    text = _storable(text)
    if len(text) <= _MAX_SHORT_TEXT:
        return text
    digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
    return f"{text[: _MAX_SHORT_TEXT - 33]}#{digest}"


def _storable(text: str) -> str:
    """`text` without what a database refuses: NUL (PostgreSQL) and lone surrogates (both)."""
    if text.isascii() and "\x00" not in text:
        return text
    return text.encode("utf-8", "replace").decode().replace("\x00", "\N{REPLACEMENT CHARACTER}")


def encode(record: CompletionRecord) -> bytes:
    """One journal line, without its line end. Raises TypeError or ValueError when the record is not JSON-able."""
    return json.dumps(record.to_json(), separators=(",", ":"), allow_nan=False).encode()


def decode(line: bytes) -> CompletionRecord:
    """The record of one journal line. Raises InvalidInputError when the line is torn or not a record."""
    try:
        data = json.loads(line)
    except ValueError as error:
        raise InvalidInputError(f"not a journal line: {error}") from error
    if not isinstance(data, dict):
        raise InvalidInputError(f"not a journal line: expected an object, got {type(data).__name__}")
    return CompletionRecord.from_json(data)
