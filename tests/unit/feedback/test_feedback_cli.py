"""`scion feedback` and `scion dataset`, on a SQLite database with a handful of votes."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from scion_adapters.cli.output import console
from scion_adapters.database import Database
from scion_adapters.errors import InvalidInputError, NotFoundError, ScionError
from scion_adapters.settings import CONFIG_ENV
from scion_feedback.cli import register
from tests.helpers.databases import sqlite_database
from tests.helpers.feedback import HASHER, Votes, record


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Database:
    (tmp_path / "scion.toml").write_text("[trainer]\nmin_ratings = 4\nheldout_share = 0.25\n")
    monkeypatch.setenv(CONFIG_ENV, str(tmp_path / "scion.toml"))
    database = sqlite_database(tmp_path)
    votes = Votes(database)
    votes.completions.insert([record(f"c{n}") for n in range(8)])
    for n in range(8):
        votes.vote(f"c{n}", value=n % 2, user=f"user-{n}", id=f"v{n}")
    votes.vote("c0", comment="[bold]not markup[/bold]", user="user-0", id="words")
    votes.vote("nowhere", value=1)
    database.dispose()
    return database


def _invoke(*arguments: str, error: type[ScionError] | None = None) -> Result:
    app = typer.Typer()
    register(app)
    result = CliRunner().invoke(app, list(arguments))
    if error is None:
        assert result.exit_code == 0, result.output
    else:
        assert isinstance(result.exception, error), result.output
    return result


def _json(*arguments: str) -> Any:
    return json.loads(_invoke(*arguments, "--json").stdout)


@pytest.mark.usefixtures("database")
def test_stats() -> None:
    data = _json("feedback", "stats", "chat")
    assert data["unmatched"] == 1
    (version,) = data["versions"]
    assert (version["up"], version["down"], version["share"], version["users"]) == (4, 4, 0.5, 8)
    table = _invoke("feedback", "stats").stdout
    assert "chat:1" in table
    assert "50.0%" in table
    assert "1 votes are about answers that are not recorded" in table


@pytest.mark.usefixtures("database")
@pytest.mark.parametrize("name", ["c0", "v0"])  # an answer's id shows all its votes, a vote's id that one
def test_show(name: str) -> None:
    data = _json("feedback", "show", name)
    assert [vote["id"] for vote in data["feedback"]] == (["v0", "words"] if name == "c0" else ["v0"])
    assert data["completion"]["id"] == "c0"
    assert data["feedback"][0]["user_hash"] != HASHER.hash("nobody")
    assert "answer of c0" in _invoke("feedback", "show", name).stdout


@pytest.mark.usefixtures("database")
def test_show_prints_what_users_wrote_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_width", 300)
    assert "[bold]not markup[/bold]" in _invoke("feedback", "show", "words").stdout


@pytest.mark.usefixtures("database")
def test_show_of_nothing() -> None:
    _invoke("feedback", "show", "never", error=NotFoundError)


@pytest.mark.usefixtures("database")
def test_export(tmp_path: Path) -> None:
    file = tmp_path / "votes.jsonl"
    _invoke("feedback", "export", str(file), "--with-answers")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(rows) == 10
    assert rows[0]["model"] == "chat:1"
    assert rows[0]["choices"][0]["message"]["content"] == "answer of c0"
    assert rows[-1]["choices"] is None
    assert "user-0" not in file.read_text()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    lines = _invoke("feedback", "export", "-", "--adapter", "chat").stdout.splitlines()
    assert len([line for line in lines if line.startswith("{")]) == 9


@pytest.mark.usefixtures("database")
def test_dataset(tmp_path: Path) -> None:
    built = _json("dataset", "build", "chat")
    assert built["counts"]["rows"] == 8
    assert built["dropped"] == {"comment_only": 1, "unknown_completion": 1}
    assert (Path(built["path"]) / "rows.jsonl").exists()
    shown = _json("dataset", "show", built["id"][:20])
    assert shown == built
    table = _invoke("dataset", "show", built["id"]).stdout
    assert "dropped: comment_only" in table
    assert "25% held out" in table
    _invoke("dataset", "show", "0000", error=NotFoundError)


@pytest.mark.usefixtures("database")
def test_dataset_needs_ratings() -> None:
    _invoke("dataset", "build", "chat", "--since", "1h", error=InvalidInputError)  # the votes are from 1970
