"""API keys: who may ask and rate (`chat`), and who may also move traffic and read others' data (`ops`).

A key is `sk-scion-<id>-<secret>`; the database holds only its id and its hash. Knows nothing of HTTP.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

import sqlalchemy as sa

from scion_adapters import tables
from scion_adapters.clock import Clock, now
from scion_adapters.database import Database
from scion_adapters.errors import InvalidInputError, NotFoundError
from scion_adapters.events import bump_routing, record

_KEY = re.compile(r"sk-scion-([0-9a-f]{12})-[A-Za-z0-9_-]{40,64}")
_ID_BYTES = 6
_SECRET_BYTES = 32
_MAX_NAME = 128
_NOBODY = "0" * 64


class Scope(StrEnum):
    CHAT = "chat"  # ask and rate
    OPS = "ops"  # all that, and everything that moves traffic, reads others' data or erases

    def covers(self, needed: Scope) -> bool:
        """Whether a key of this scope may do what needs `needed`."""
        return self is Scope.OPS or needed is Scope.CHAT


@dataclass(frozen=True, slots=True)
class ApiKey:
    """All of a key but the key itself. `name` says in a person's words whose it is."""

    id: str
    name: str
    scope: Scope
    created_at: float
    created_by: str
    revoked_at: float | None


@dataclass(frozen=True, slots=True)
class KeyRing:
    """The keys as they are at one time. A server without any is open; one whose keys are all revoked is closed."""

    keys: Mapping[str, ApiKey]
    hashes: Mapping[str, str]

    @property
    def is_open(self) -> bool:
        return not self.keys

    @property
    def num_valid(self) -> int:
        """Keys that are not revoked."""
        return sum(key.revoked_at is None for key in self.keys.values())

    def check(self, presented: str) -> ApiKey | None:
        """The key that was presented, or None. Takes the same time whether the id or the secret is wrong."""
        key_id = key_id_of(presented)
        expected = self.hashes.get(key_id or "", _NOBODY)
        is_right = hmac.compare_digest(expected, _hash(presented))
        key = self.keys.get(key_id or "")
        return key if is_right and key is not None and key.revoked_at is None else None


EMPTY_RING = KeyRing(MappingProxyType({}), MappingProxyType({}))


def key_id_of(presented: str) -> str | None:
    """The public part of something that looks like a key, else None."""
    match = _KEY.fullmatch(presented)
    return match[1] if match else None


def create_key(database: Database, name: str, scope: Scope, *, actor: str, clock: Clock = now) -> tuple[ApiKey, str]:
    """A new key and, this once, the key itself. Servers know it within a second."""
    if not name.strip() or len(name) > _MAX_NAME:
        raise InvalidInputError(
            f"key name {name[:80]!r}: expected 1 to {_MAX_NAME} characters that say whose it is", field="name"
        )
    key_id = secrets.token_hex(_ID_BYTES)
    plain = f"sk-scion-{key_id}-{secrets.token_urlsafe(_SECRET_BYTES)}"
    key = ApiKey(key_id, name, scope, clock(), actor[:128], None)
    with database.write() as connection:
        connection.execute(
            sa.insert(tables.api_keys).values(
                id=key_id,
                hash=_hash(plain),
                name=name,
                scopes=[scope],
                created_at=key.created_at,
                created_by=key.created_by,
            )
        )
        data = {"id": key_id, "name": name, "scope": scope}
        record(connection, key.created_at, "key.created", actor=actor, data=data)
        bump_routing(connection)
    return key, plain


def revoke_key(database: Database, key_id: str, *, actor: str, reason: str = "", clock: Clock = now) -> ApiKey:
    """Never accept the key again. Does nothing when it is revoked already."""
    at = clock()
    with database.write() as connection:
        this = tables.api_keys.c.id == key_id
        row = connection.execute(sa.select(tables.api_keys).where(this)).mappings().first()
        if row is None:
            raise NotFoundError(f"there is no key {key_id[:40]!r}: `scion keys list` shows their ids")
        if row["revoked_at"] is None:
            connection.execute(sa.update(tables.api_keys).where(this).values(revoked_at=at))
            data = {"id": key_id, "name": row["name"]}
            record(connection, at, "key.revoked", actor=actor, reason=reason, data=data)
            bump_routing(connection)
        return _to_key({**row, "revoked_at": row["revoked_at"] or at})


def list_keys(database: Database) -> list[ApiKey]:
    """All keys, the revoked ones too, oldest first."""
    query = sa.select(tables.api_keys).order_by(tables.api_keys.c.created_at, tables.api_keys.c.id)
    with database.read() as connection:
        return [_to_key(row) for row in connection.execute(query).mappings()]


def load_key_ring(database: Database) -> KeyRing:
    """What servers check requests against."""
    with database.read() as connection:
        return key_ring_in(connection)


def key_ring_in(connection: sa.Connection) -> KeyRing:
    """The ring as the caller's transaction sees it."""
    rows = connection.execute(sa.select(tables.api_keys)).mappings().all()
    return KeyRing(
        MappingProxyType({row["id"]: _to_key(row) for row in rows}),
        MappingProxyType({row["id"]: str(row["hash"]) for row in rows}),
    )


def _to_key(row: Mapping[str, object] | sa.RowMapping) -> ApiKey:
    scopes = row["scopes"]
    assert isinstance(scopes, list)
    scope = Scope.OPS if Scope.OPS in scopes else Scope.CHAT
    revoked_at = row["revoked_at"]
    return ApiKey(
        id=str(row["id"]),
        name=str(row["name"]),
        scope=scope,
        created_at=float(str(row["created_at"])),
        created_by=str(row["created_by"]),
        revoked_at=None if revoked_at is None else float(str(revoked_at)),
    )


def _hash(plain: str) -> str:
    """SHA-256: the key is 256 random bits, so nothing slower makes guessing harder."""
    return hashlib.sha256(plain.encode("utf-8", "surrogatepass")).hexdigest()
