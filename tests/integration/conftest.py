"""Fixtures of the integration tests: `database` is a fresh, migrated database, on SQLite and on PostgreSQL."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from scion_adapters.database import Database
from tests.helpers.databases import sqlite_database
from tests.helpers.postgres import Cluster, PostgresMissingError, postgres_cluster

_TEMPLATE = "template_scion"


@pytest.fixture(scope="session")
def postgres() -> Iterator[Cluster]:
    """A private PostgreSQL cluster for the session."""
    try:
        with postgres_cluster() as cluster:
            yield cluster
    except PostgresMissingError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def _postgres_template(postgres: Cluster) -> str:
    database = Database(postgres.create(_TEMPLATE))
    database.upgrade()
    database.dispose()  # a template must have no connections
    return _TEMPLATE


@pytest.fixture
def postgres_database(postgres: Cluster, _postgres_template: str) -> Iterator[Database]:
    """A fresh, migrated database on PostgreSQL."""
    name = f"test_{uuid.uuid4().hex}"
    database = Database(postgres.create(name, template=_postgres_template))
    yield database
    database.dispose()
    postgres.drop(name)


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    """A fresh, migrated database of each kind."""
    if request.param == "postgresql":
        yield request.getfixturevalue("postgres_database")
        return
    database = sqlite_database(tmp_path)
    yield database
    database.dispose()


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of a database without any table, of each kind."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'empty.db'}"
        return
    cluster: Cluster = request.getfixturevalue("postgres")
    name = f"empty_{uuid.uuid4().hex}"
    yield cluster.create(name)
    cluster.drop(name)
