"""`scion init` and `scion doctor`: making a configuration, and saying what is wrong with the present one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from scion_adapters.cli.output import JsonOption, console, print_json

_SIGNS = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "failed": "[bold red]failed[/]"}


def register(app: typer.Typer) -> None:
    """Add `init` and `doctor` to `scion`."""
    app.command()(init)
    app.command()(doctor)


def init(
    directory: Annotated[Path, typer.Argument(help="Folder for the new configuration.")] = Path("."),
    show: Annotated[bool, typer.Option("--print", help="Write to the terminal instead of a file.")] = False,
    base: Annotated[
        str | None, typer.Option("--base", help="The base model: a directory, or a Hugging Face id.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing configuration.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Write scion.toml with every setting, its meaning and its default."""
    from scion_adapters.configuration import render_configuration
    from scion_adapters.errors import ConflictError
    from scion_adapters.settings import DEFAULT_CONFIG

    model = base
    if base is not None and Path(base).expanduser().is_dir():
        model = str(Path(base).expanduser().resolve())  # relative paths in the file are relative to the file
    text = render_configuration({"base": {"model": model or "base"}})
    if show:
        sys.stdout.write(text)
        return
    file = directory.expanduser().resolve() / DEFAULT_CONFIG
    if file.exists() and not force:
        raise ConflictError(
            f"{file} exists already: use --force to replace it, or --print to see what would be written"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    if as_json:
        print_json({"file": str(file)})
        return
    console.print(f"Wrote {file}.", soft_wrap=True)
    if base is None:
        console.print("Name your base model in it: `model` in \\[base].")
    console.print("Then `scion doctor` says what is missing, and `scion serve` starts the server.")


def doctor(
    repair: Annotated[bool, typer.Option("--repair", help="Mend what processes that were killed left behind.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check configuration, base, database, store, vLLM and servers; exit code 1 if something is broken."""
    from scion_adapters.doctor import examine

    checks = examine(repair=repair)
    if as_json:
        print_json({"ok": all(check.result != "failed" for check in checks), "checks": checks})
    else:
        for check in checks:
            console.print(f"{_SIGNS[check.result]:>20} {check.name}: {escape(check.detail)}", soft_wrap=True)
    if any(check.result == "failed" for check in checks):
        raise typer.Exit(1)
