"""A private PostgreSQL cluster for the tests: made, started, stopped and deleted here, reachable by socket only."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

_FLAGS = (
    "-c fsync=off -c synchronous_commit=off -c full_page_writes=off -c shared_buffers=32MB -c max_connections=60 "
    "-c listen_addresses='' -c autovacuum=off"
)


class PostgresMissingError(RuntimeError):
    """The machine has no PostgreSQL binaries."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A running cluster. `directory` holds its socket."""

    directory: Path
    user: str

    def url(self, name: str) -> str:
        """SQLAlchemy's URL of the database `name`."""
        return f"postgresql+psycopg://{self.user}@/{name}?host={self.directory}"

    def create(self, name: str, *, template: str | None = None) -> str:
        """Make an empty database, or a copy of `template` (nobody may be connected to that one). Returns its URL."""
        self._execute(f'CREATE DATABASE "{name}"' + (f' TEMPLATE "{template}"' if template else ""))
        return self.url(name)

    def drop(self, name: str) -> None:
        self._execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')

    def _execute(self, statement: str) -> None:
        with psycopg.connect(
            host=str(self.directory), user=self.user, dbname="postgres", autocommit=True
        ) as connection:
            connection.execute(statement.encode())


@contextmanager
def postgres_cluster() -> Iterator[Cluster]:
    """Start a cluster and stop it at the end of the block. It refuses to run as root, so root lends it a user."""
    initdb, pg_ctl = _binary("initdb"), _binary("pg_ctl")
    account = _account()
    home = Path(tempfile.mkdtemp(prefix="scion-pg-"))  # short: a socket's path has at most 107 characters
    try:
        if os.getuid() == 0:
            os.chown(home, account.pw_uid, account.pw_gid)
        data = home / "data"
        _run(account, [initdb, "-D", str(data), "-U", "scion", "-A", "trust", "-E", "UTF8", "--no-sync", "--locale=C"])
        flags = f"{_FLAGS} -k {home}"
        _run(account, [pg_ctl, "-D", str(data), "-o", flags, "-l", str(home / "log"), "-w", "-t", "60", "start"])
        try:
            yield Cluster(home, "scion")
        finally:
            _run(account, [pg_ctl, "-D", str(data), "-m", "immediate", "-w", "stop"])
    finally:
        shutil.rmtree(home, ignore_errors=True)


def stop_cluster(cluster: Cluster) -> None:
    """Take the database away while clients use it. Not "immediate": _FLAGS would let it forget what it committed."""
    _run(_account(), [_binary("pg_ctl"), "-D", str(cluster.directory / "data"), "-m", "fast", "-w", "stop"])


def start_cluster(cluster: Cluster) -> None:
    """Bring a stopped cluster back."""
    home = cluster.directory
    arguments = [
        "-D",
        str(home / "data"),
        "-o",
        f"{_FLAGS} -k {home}",
        "-l",
        str(home / "log"),
        "-w",
        "-t",
        "60",
        "start",
    ]
    _run(_account(), [_binary("pg_ctl"), *arguments])


@contextmanager
def standing_by(cluster: Cluster) -> Iterator[None]:
    """During the block the cluster recovers for ever, as a standby does: it can be read, and refuses every write."""
    stop_cluster(cluster)
    signal = cluster.directory / "data" / "standby.signal"
    signal.touch()
    start_cluster(cluster)
    yield
    _run(_account(), [_binary("pg_ctl"), "-D", str(signal.parent), "-w", "promote"])


def _binary(name: str) -> str:
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: path.parent.name, reverse=True)
    for directory in versions:  # Debian puts only the client programs on PATH
        if (directory / name).is_file():
            return str(directory / name)
    if found := shutil.which(name):
        return found
    raise PostgresMissingError(
        f"{name} is neither on PATH nor below /usr/lib/postgresql: install PostgreSQL to run these tests"
    )


def _account() -> pwd.struct_passwd:
    if os.getuid() != 0:
        return pwd.getpwuid(os.getuid())
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise PostgresMissingError("PostgreSQL does not run as root, and there is no user postgres or nobody to run it as")


def _run(account: pwd.struct_passwd, command: list[str]) -> None:
    as_other: dict[str, Any] = (
        {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []} if os.getuid() == 0 else {}
    )
    result = subprocess.run(
        command,
        cwd="/",
        env={"PATH": os.environ.get("PATH", ""), "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,  # a pipe would stay open in the server that pg_ctl leaves behind
        stderr=subprocess.PIPE if command[0].endswith("initdb") else subprocess.DEVNULL,
        text=True,
        check=False,
        **as_other,
    )
    if result.returncode != 0:
        raise RuntimeError(f"{command[0]} failed with {result.returncode}: {result.stderr}")
