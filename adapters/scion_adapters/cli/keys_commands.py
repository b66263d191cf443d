"""`scion keys`: who may use the server."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from scion_adapters.cli.output import (
    JsonOption,
    ReasonOption,
    actor,
    console,
    format_time,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from scion_adapters.database import Database


class ScopeName(StrEnum):
    """keys.Scope for the command line: importing that module takes too long for `scion --help`."""

    CHAT = "chat"
    OPS = "ops"


def register(app: typer.Typer) -> None:
    """Add `keys` to `scion`."""
    group = typer.Typer(name="keys", help="API keys of the server.", no_args_is_help=True)
    group.command("create")(create)
    group.command("list")(list_all)
    group.command("revoke")(revoke)
    app.add_typer(group)


def create(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is, such as shop-frontend.")],
    scope: Annotated[ScopeName, typer.Option(help="chat: ask and rate. ops: everything.")] = ScopeName.CHAT,
    as_json: JsonOption = False,
) -> None:
    """Make a key and print it, this once. The first key closes a server that was open."""
    from scion_adapters.keys import Scope, create_key

    key, plain = create_key(_database(), name, Scope(scope), actor=actor())
    if as_json:
        print_json({"id": key.id, "name": key.name, "scope": key.scope, "key": plain})
        return
    console.print(plain, highlight=False, soft_wrap=True)
    console.print(f"Keep it: it is not shown again. `scion keys revoke {key.id}` ends it.", soft_wrap=True)


def list_all(as_json: JsonOption = False) -> None:
    """List keys, without the keys themselves."""
    from scion_adapters.keys import list_keys

    found = list_keys(_database())
    if as_json:
        print_json(found)
        return
    rows = [
        (key.id, key.name, key.scope, format_time(key.created_at), key.created_by, _until(key.revoked_at))
        for key in found
    ]
    print_table(("id", "name", "scope", "created", "by", "revoked"), rows)


def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="As `scion keys list` shows it.")],
    reason: ReasonOption = "",
    as_json: JsonOption = False,
) -> None:
    """End a key; servers refuse it within a second."""
    from scion_adapters.keys import revoke_key

    key = revoke_key(_database(), key_id, actor=actor(), reason=reason)
    if as_json:
        print_json(key)
    else:
        console.print(f"Key {key.id} ({key.name}) is revoked.", soft_wrap=True)


def _until(revoked_at: float | None) -> str | None:
    return None if revoked_at is None else format_time(revoked_at)


def _database() -> Database:
    from scion_adapters.database import open_database
    from scion_adapters.settings import load_settings

    return open_database(load_settings())
