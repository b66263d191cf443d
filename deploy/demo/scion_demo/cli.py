"""`scion demo`: the command around the story."""

import asyncio
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

DEFAULT_FOLDER = Path("build/demo")


def register(app: typer.Typer) -> None:
    """Add `scion demo`."""

    @app.command()
    def demo(
        prefer: Annotated[
            str, typer.Option(help="What users like: polite, terse, rambling, or a profile file.")
        ] = "polite",
        seed: Annotated[int, typer.Option(min=0, help="Seed of users and training.")] = 0,
        rounds: Annotated[int, typer.Option(min=1, max=10, help="At most so many versions are trained.")] = 3,
        folder: Annotated[Path, typer.Option("--dir", help="Folder to play in; emptied first.")] = DEFAULT_FOLDER,
        report: Annotated[Path | None, typer.Option(help="Write the figures to this JSON file.")] = None,
        port: Annotated[int | None, typer.Option(help="Port of the server; default: a free one.")] = None,
        keep_serving: Annotated[
            bool, typer.Option("--keep-serving", help="Leave the server up; Ctrl-C ends it.")
        ] = False,
    ) -> None:
        """Watch the whole loop: serve, rate, train, gate, roll out, and stop two bad versions. About six minutes."""
        from scion_demo.errors import DemoError

        console = Console()
        try:
            met = asyncio.run(_play(console, prefer, seed, rounds, folder, report, port, keep_serving))
        except DemoError as error:
            Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False)
            sys.exit(1)
        except asyncio.CancelledError:
            sys.exit(128 + signal.SIGTERM)
        sys.exit(0 if met else 1)


async def _play(
    console: Console,
    prefer: str,
    seed: int,
    rounds: int,
    folder: Path,
    report: Path | None,
    port: int | None,
    keep_serving: bool,
) -> bool:
    from scion_demo.demo import Chronicle, play
    from scion_demo.profiles import load_profile
    from scion_demo.results import plot, show, write_json
    from scion_demo.stage import set_stage

    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)  # the server must not outlive us
    profile = load_profile(prefer)
    stage = set_stage(folder, seed=seed, port=port)
    chronicle = Chronicle()
    try:
        result = await play(stage, profile, seed=seed, max_rounds=rounds, console=console, chronicle=chronicle)
        picture = stage.folder / "demo.png"
        plot(result, chronicle.windows(), chronicle.marks, picture)
        if report is not None:
            write_json(result, report)
        show(result, console)
        console.print(
            f"plot: {picture}\nlogs, database, adapters and reports: {stage.folder}", highlight=False, soft_wrap=True
        )
        if keep_serving:
            console.print(f"serving at {stage.base_url}/v1 (model: chat); Ctrl-C ends it", highlight=False)
            await stage.serve_until_interrupted()
    finally:
        await stage.stop_server()
    return all(result.bars().values())
