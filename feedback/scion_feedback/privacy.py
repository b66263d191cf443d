"""User names: only a keyed hash of them is ever stored. Owns the key and the hash; knows nothing of feedback.

A plain hash of a user name can be undone by trying names; without the key this one cannot.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
from pathlib import Path

from scion_adapters.errors import InvalidInputError
from scion_adapters.files import fsync_path
from scion_adapters.settings import Settings

MIN_KEY_BYTES = 16
_logger = logging.getLogger(__name__)


class UserHasher:
    """HMAC-SHA256 under one key. All processes of a deployment must hold the same, or one user looks like several."""

    def __init__(self, key: bytes) -> None:
        if len(key) < MIN_KEY_BYTES:
            raise InvalidInputError(
                f"the user hash key has {len(key)} bytes; at least {MIN_KEY_BYTES} are needed: "
                "remove the key file to have a new one made, or set a longer SCION_PRIVACY__HASH_KEY",
                field="privacy.hash_key",
            )
        self.key = key

    def hash(self, user: str) -> str:
        """32 hexadecimal digits that stand for `user`."""
        return hmac.new(self.key, user.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:32]

    def __repr__(self) -> str:
        return "UserHasher(…)"  # a key in a log would undo everything


def open_hasher(settings: Settings) -> UserHasher:
    """The hasher with the configured key: `privacy.hash_key`, else the key file, which is made if it does not exist."""
    if settings.privacy.hash_key is not None:
        return UserHasher(settings.privacy.hash_key.encode())
    path = settings.path(settings.privacy.hash_key_file)
    try:
        if not path.exists():
            _make_key_file(path)
        key = path.read_bytes().strip()
        readable_by_others = path.stat().st_mode & 0o077
    except OSError as error:
        raise InvalidInputError(
            f"the user hash key {path} cannot be read or made: {error}; correct privacy.hash_key_file, or set "
            "SCION_PRIVACY__HASH_KEY",
            field="privacy.hash_key_file",
        ) from error
    if readable_by_others:
        _logger.warning("the user hash key %s can be read by other accounts; `chmod 600` it", path)
    return UserHasher(key)


def _make_key_file(path: Path) -> None:
    """Write a new key to `path`, unless another process does so first; nobody ever sees half a key."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_hex(32).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)  # unlike rename, fails when the file exists: the first writer's key stays
        except FileExistsError:
            return
        fsync_path(path.parent)
    finally:
        temporary.unlink()
