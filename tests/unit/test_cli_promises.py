"""Promises of the whole `scion` command: it starts quickly, explains every command and option, and speaks JSON."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from scion_adapters.cli import main as cli_main
from scion_adapters.errors import NotFoundError

HEAVY = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "vllm", "matplotlib", "ray", "sqlalchemy")


def walk(command: Any, path: str = "scion") -> Iterator[tuple[str, Any]]:
    yield path, command
    for name, child in getattr(command, "commands", {}).items():
        yield from walk(child, f"{path} {name}")


@pytest.fixture(scope="module")
def commands() -> dict[str, Any]:
    return dict(walk(typer.main.get_command(cli_main.build_app())))


def test_every_command_has_a_help_text(commands: dict[str, Any]) -> None:
    assert len(commands) > 15
    assert [path for path, command in commands.items() if not (command.help or "").strip()] == []


def test_every_option_and_argument_is_explained(commands: dict[str, Any]) -> None:
    silent = [
        f"{path} {parameter.name}"
        for path, command in commands.items()
        for parameter in command.params
        if not getattr(parameter, "help", None) and parameter.name != "help"
    ]
    assert silent == []


NO_JSON = {
    "scion serve",  # runs until it is stopped
    "scion trainer",  # the same
    "scion demo",  # narrates; its figures go to --report FILE
    "scion feedback export",  # writes JSON lines and nothing else
}


def test_every_command_speaks_json(commands: dict[str, Any]) -> None:
    leaves = {path: command for path, command in commands.items() if not hasattr(command, "commands")}
    mute = {path for path, leaf in leaves.items() if not any("--json" in parameter.opts for parameter in leaf.params)}
    assert mute - NO_JSON == set()


def test_help_starts_quickly_because_it_imports_nothing_heavy() -> None:
    program = (
        "import sys, time; from scion_adapters.cli.main import build_app; build_app(); "
        f"print(time.process_time(), *[name for name in {HEAVY!r} if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    seconds, *heavy = result.stdout.split()
    assert heavy == []
    assert float(seconds) < 1.5


def test_errors_of_ours_are_a_line_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build_app() -> typer.Typer:
        app = typer.Typer()

        @app.command()
        def fail() -> None:
            raise NotFoundError("no adapter [bold]'x'[/bold]")

        return app

    monkeypatch.setattr(cli_main, "build_app", build_app)
    monkeypatch.setattr(sys, "argv", ["scion"])
    with pytest.raises(SystemExit) as caught:
        cli_main.main()
    assert caught.value.code == NotFoundError.exit_code
    assert capsys.readouterr().err == "error: no adapter [bold]'x'[/bold]\n"
