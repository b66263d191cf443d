"""`scion db`: the database's schema."""

from __future__ import annotations

import typer

from scion_adapters.cli.output import JsonOption, console, print_json


def register(app: typer.Typer) -> None:
    """Add `db` to `scion`."""
    group = typer.Typer(name="db", help="The database's schema.", no_args_is_help=True)
    group.command()(upgrade)
    group.command()(show)
    app.add_typer(group)


def upgrade(as_json: JsonOption = False) -> None:
    """Bring the database to the newest schema; does nothing when it is there already."""
    from scion_adapters.database import open_database
    from scion_adapters.settings import load_settings

    database = open_database(load_settings(), upgrade=False)
    before = database.current_revision()
    database.upgrade()
    after = database.current_revision()
    if as_json:
        print_json({"database": _shown_url(database.url), "before": before, "after": after})
    elif before == after:
        console.print(f"{_shown_url(database.url)} is at the newest schema, revision {after}.")
    else:
        console.print(f"{_shown_url(database.url)}: revision {before or 'none'} -> {after}.")


def show(as_json: JsonOption = False) -> None:
    """Say which database is used, which schema it has and which one this program wants."""
    from scion_adapters.database import open_database
    from scion_adapters.settings import load_settings

    database = open_database(load_settings(), upgrade=False)
    database.check_revision()
    revision, head = database.current_revision(), database.head_revision()
    data = {"database": _shown_url(database.url), "revision": revision, "head": head, "current": revision == head}
    if as_json:
        print_json(data)
        return
    remedy = "" if revision == head else "; run `scion db upgrade`"
    console.print(f"{data['database']}: revision {revision or 'none'}, newest {head}{remedy}.")


def _shown_url(url: str) -> str:
    import sqlalchemy as sa

    return sa.make_url(url).render_as_string(hide_password=True)
