"""`scion serve`. Imports nothing heavy until it runs."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Annotated

import typer

from scion_adapters.cli.output import error_console
from scion_adapters.settings import load_settings


def register(app: typer.Typer) -> None:
    """Add this package's commands to `scion`."""

    @app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
    def serve(
        context: typer.Context,
        print_only: Annotated[
            bool, typer.Option("--print", help="Print the environment and the `vllm serve` line instead of starting.")
        ] = False,
        host: Annotated[str | None, typer.Option(help="Overrides server.host.")] = None,
        port: Annotated[int | None, typer.Option(help="Overrides server.port.")] = None,
    ) -> None:
        """Start vLLM with the plugin on the configured base. Further options are passed on to vLLM."""
        from vllm_scion import serve as launcher

        asked = {key: value for key, value in (("host", host), ("port", port)) if value is not None}
        settings = load_settings(overrides={"server": asked} if asked else None)
        launch = launcher.plan_launch(
            settings,
            config_file=launcher.config_file(),
            environ=os.environ,
            cores=launcher.available_cores(),
            is_cpu=launcher.is_cpu_build(),
        )
        launch = replace(launch, arguments=(*launch.arguments, *context.args))
        if print_only:
            typer.echo(launcher.as_shell(launch))
            return
        launcher.check_plugin()
        has_keys = launcher.check_surroundings(settings, launch.arguments)
        if (warning := launcher.warn_about_binding(settings.server.host, launch.arguments, has_keys)) is not None:
            error_console.print(f"[bold yellow]warning:[/] {warning}", highlight=False)
        launcher.become(launch)
