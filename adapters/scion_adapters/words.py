"""The column type of free text that quotes strangers: reasons, messages, errors. Every database takes what it binds.

PostgreSQL takes no NUL and no half surrogate, and a change must not fail because of what its reason quotes.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Text
from sqlalchemy.types import TypeDecorator


class Words(TypeDecorator[str]):
    """Text in which what cannot be stored is written as an escape: NUL as `\\0`, half a surrogate as `\\ud800`."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:
        return None if value is None else storable(value)


def storable(text: str) -> str:
    """`text` as every database takes it."""
    return text.replace("\0", "\\0").encode(errors="backslashreplace").decode()
