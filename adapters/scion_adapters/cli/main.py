"""The root of `scion`. Every package adds its own commands through the entry-point group `scion.commands`.

An entry point is a function `register(app: typer.Typer) -> None`. Errors of ours end the program with a line on stderr
and the error's exit code; 0 is success, 1 a failure, 2 wrong input, 3 not found, 4 conflict, 5 refused by a check,
6 unavailable.
"""

from __future__ import annotations

import os
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from scion_adapters.cli.output import error_console
from scion_adapters.errors import ScionError
from scion_adapters.settings import CONFIG_ENV

COMMAND_GROUP = "scion.commands"


def build_app() -> typer.Typer:
    """The complete command-line application."""
    app = typer.Typer(
        name="scion",
        help="A served model that keeps learning from its users.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        add_completion=False,
    )

    @app.callback()
    def root(
        config: Annotated[
            Path | None,
            typer.Option("--config", "-c", envvar=CONFIG_ENV, help="Configuration file; default ./scion.toml."),
        ] = None,
    ) -> None:
        if config is not None:
            os.environ[CONFIG_ENV] = str(config.expanduser().resolve())  # children (server, runs) read the same file

    for entry_point in sorted(entry_points(group=COMMAND_GROUP), key=lambda e: e.name):
        entry_point.load()(app)
    return app


def main() -> None:
    """Run `scion` with the arguments of this process and exit."""
    try:
        build_app()()
    except ScionError as error:
        error_console.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
