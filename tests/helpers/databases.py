"""Fresh, migrated databases for tests, copied from a template that is migrated once per process."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

from scion_adapters.database import Database


@cache
def _sqlite_template() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="scion-sqlite-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    database = Database(f"sqlite:///{directory / 'template.db'}")
    database.upgrade()
    database.dispose()  # the last connection moves the write-ahead log into the file
    return directory / "template.db"


def sqlite_database(directory: Path) -> Database:
    """A migrated SQLite database in `directory`; dispose it when the test is over."""
    file = directory / "scion.db"
    shutil.copyfile(_sqlite_template(), file)
    return Database(f"sqlite:///{file}")
