"""The trainer's commands: `train`, `trainer`, `evaluate`; the others are in runs_cli.py and red_team/cli.py.

Owns what is printed and the exit codes. Nothing heavy is imported before a command runs.
"""

from __future__ import annotations

import logging
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scion_adapters.cli.output import JsonOption, actor, console, error_console, print_json, print_table
from scion_adapters.errors import InvalidInputError
from scion_trainer.limits import bind_process
from scion_trainer.red_team.cli import red_team_run
from scion_trainer.runs_cli import run_json, runs_list, runs_show

if TYPE_CHECKING:
    from scion_adapters.database import Database
    from scion_adapters.records import Run
    from scion_adapters.settings import Settings
    from scion_trainer.followup import Followed, RewardProduct


class RecipeName(StrEnum):
    """The recipes, as `--recipe` takes them; a test compares them with RECIPES."""

    AUTO = "auto"
    SFT = "sft"
    KTO = "kto"
    DPO = "dpo"
    REWARD = "reward"
    PPO = "ppo"
    DISTILL = "distill"


def register(app: typer.Typer) -> None:
    """Add the commands to `scion`."""
    app.command("train")(train)
    app.command("trainer")(trainer)
    app.command("evaluate")(evaluate)
    runs_app = typer.Typer(help="Training runs.", no_args_is_help=True)
    runs_app.command("list")(runs_list)
    runs_app.command("show")(runs_show)
    app.add_typer(runs_app, name="runs")
    red_team_app = typer.Typer(help="Probes that a version should withstand.", no_args_is_help=True)
    red_team_app.command("run")(red_team_run)
    app.add_typer(red_team_app, name="red-team")


def train(
    name: Annotated[str, typer.Argument(help="The adapter, such as chat.")],
    recipe: Annotated[
        RecipeName | None,
        typer.Option(
            help="kto: thumbs up and down; sft: corrections and liked answers; dpo: pairs; reward: a reward model; "
            "ppo: against a reward model that passed its gate; distill: from a teacher; auto: by the ratings. "
            "Default: as configured."
        ),
    ] = None,
    since: Annotated[
        str | None, typer.Option(help="Only ratings of the last 90s, 30m, 2h, 7d, 4w. Default: all.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the newest unfinished run.")] = False,
    evaluate: Annotated[bool, typer.Option(help="Let the gates judge the candidate.")] = True,
    rollout: Annotated[bool, typer.Option("--rollout", help="Start a rollout if the candidate is accepted.")] = False,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Only say how much memory a run would take, and what would fit.")
    ] = False,
    json: JsonOption = False,
) -> None:
    """Train a new version of an adapter on its users' ratings, here and now."""
    from scion_adapters.clock import now
    from scion_adapters.database import open_database
    from scion_adapters.rollout_plan import parse_duration
    from scion_adapters.settings import load_settings
    from scion_trainer.followup import follow_up, reward_product
    from scion_trainer.launch import create_run, launch_run, resumable_run

    settings = load_settings()
    bind_process(settings.trainer.cores, settings.trainer.threads)
    database = open_database(settings)
    if estimate:
        _estimate(settings, database, name, recipe, json=json)
        return
    if resume:
        if recipe is not None or since is not None:
            raise InvalidInputError("--resume goes on with a run as it was begun: leave out --recipe and --since")
        run = resumable_run(database, name)
    else:
        configured = settings.adapters[name].recipe if name in settings.adapters else None
        run = create_run(
            settings,
            database,
            name,
            str(recipe or configured or settings.trainer.recipe),
            actor=actor(),
            since=None if since is None else now() - parse_duration(since, field="since"),
        )
    error_console.print(f"{run.id}: attempt {run.attempt + 1}, in {run.directory}", highlight=False)
    done = launch_run(settings, database, run)
    if (product := reward_product(done)) is not None:
        _print_product(done, product, json=json)
        return
    followed = follow_up(
        settings,
        database,
        done,
        evaluate=evaluate,
        rollout=rollout,
        actor=actor(),
        say=lambda text: error_console.print(text, highlight=False, markup=False),
    )
    if json:
        print_json(
            {
                "run": run_json(done),
                "version": str(followed.version.ref),
                "state": str(followed.version.state),
                "report": followed.report.to_json() if followed.report else None,
                "rollout": followed.rollout.id if followed.rollout else None,
                "note": followed.note,
            }
        )
    else:
        _print_outcome(done, followed)
    if followed.report is not None and followed.report.exit_code:
        raise typer.Exit(followed.report.exit_code)


def _estimate(settings: Settings, database: Database, name: str, recipe: RecipeName | None, *, json: bool) -> None:
    """Print what runs would take: of the recipe that is named, or of all. Exits with 6 when none of these fits."""
    from scion_trainer.estimation import outlooks
    from scion_trainer.memory import OutOfMemoryError, gib
    from scion_trainer.recipes import RECIPES

    found = outlooks(settings, database, name, [str(recipe)] if recipe in RECIPES else list(RECIPES))
    if json:
        print_json([outlook.to_json() for outlook in found])
    else:
        print_table(
            (
                "recipe",
                "micro-batch",
                "tokens",
                "rank",
                "base",
                "adapters",
                "activations",
                "in all",
                "available",
                "fits",
            ),
            [
                (
                    outlook.request.config.recipe,
                    f"{outlook.request.micro_batch_size} of {outlook.request.config.batch_size}",
                    outlook.request.longest_tokens,
                    outlook.request.rank,
                    *map(gib, (outlook.predicted.base_bytes, outlook.predicted.adapter_bytes)),
                    *map(gib, (outlook.predicted.activation_bytes, outlook.predicted.total_bytes, outlook.available)),
                    outlook.remedy or "yes",
                )
                for outlook in found
            ],
        )
    if all(outlook.remedy for outlook in found):
        raise typer.Exit(OutOfMemoryError.exit_code)


def trainer(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Also log what APScheduler does.")] = False,
) -> None:
    """Run the daemon that trains by the clock and by the number of new ratings."""
    from scion_adapters.database import open_database
    from scion_adapters.settings import load_settings
    from scion_trainer.daemon import run_daemon
    from scion_trainer.scheduler import plans

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("apscheduler").setLevel(logging.INFO if verbose else logging.WARNING)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    settings = load_settings()
    if not any(plan.schedule or plan.min_new_ratings for plan in plans(settings)):
        raise InvalidInputError(
            "nothing would ever start a run: set trainer.schedule or trainer.min_new_ratings", field="trainer.schedule"
        )
    bind_process(settings.trainer.cores, settings.trainer.threads)
    run_daemon(settings, open_database(settings))


def evaluate(
    ref: Annotated[str, typer.Argument(help="The version, such as chat:7.")],
    json: JsonOption = False,
) -> None:
    """Let the gates judge a version again, or a candidate that was not judged yet."""
    from scion_adapters.database import open_database
    from scion_adapters.registry import open_registry
    from scion_adapters.settings import load_settings
    from scion_trainer.followup import evaluate_version

    settings = load_settings()
    bind_process(settings.trainer.cores, settings.trainer.threads)
    database = open_database(settings)
    registry = open_registry(settings, database)
    version = registry.resolve(ref)
    report = evaluate_version(
        settings, database, version, say=lambda text: error_console.print(text, highlight=False, markup=False)
    )
    if json:
        print_json(report.to_json())
    else:
        _print_report(report)
        console.print(f"report: {registry.store.report_path(version)}", highlight=False, soft_wrap=True)
    if report.exit_code:
        raise typer.Exit(report.exit_code)


def _print_outcome(run: Run, followed: Followed) -> None:
    metrics = run.metrics
    print_table(
        ("version", "state", "from", "rows", "steps", "loss", "seconds", "peak memory"),
        [
            (
                followed.version.ref,
                followed.version.state,
                f"{run.adapter}:{run.parent}",
                metrics.get("rows"),
                metrics.get("steps"),
                metrics.get("train_loss"),
                metrics.get("seconds"),
                f"{metrics.get('peak_rss_bytes', 0) / (1 << 30):.2f} GiB",
            )
        ],
    )
    if followed.report is not None:
        _print_report(followed.report)
    if followed.note:
        console.print(followed.note, highlight=False, markup=False, soft_wrap=True)
    console.print(f"next: {next_command(followed)}", highlight=False, markup=False, soft_wrap=True)


def _print_product(run: Run, product: RewardProduct, *, json: bool) -> None:
    """A reward model, and an exit code that says whether it failed its gate."""
    if json:
        print_json({"run": run_json(run), "version": None, "reward_model": product.directory})
    else:
        metrics, figures = run.metrics, product.figures
        print_table(
            ("reward model", "verdict", "rows", "members", "AUROC", "pair accuracy", "seconds", "peak memory"),
            [
                (
                    run.id,
                    product.verdict,
                    metrics.get("rows"),
                    metrics.get("members"),
                    figures.get("auroc"),
                    figures.get("pair_accuracy"),
                    metrics.get("seconds"),
                    f"{metrics.get('peak_rss_bytes', 0) / (1 << 30):.2f} GiB",
                )
            ],
        )
        console.print(f"{product.verdict}: {product.reason}", highlight=False, markup=False, soft_wrap=True)
        console.print(f"next: {product.next}", highlight=False, markup=False, soft_wrap=True)
    if product.exit_code:
        raise typer.Exit(product.exit_code)


def next_command(followed: Followed) -> str:
    """What one would type now."""
    from scion_adapters.records import VersionState

    ref = followed.version.ref
    if followed.rollout is not None:
        return f"scion rollout status {ref.adapter}"
    if followed.version.state is VersionState.ACCEPTED:
        return f"scion rollout start {ref}"
    if followed.version.state is VersionState.REJECTED:
        return f"scion adapters show {ref}"
    return f"scion evaluate {ref}"


def _print_report(report: Any) -> None:
    print_table(
        ("gate", "verdict", "why"),
        [(gate.name, gate.verdict, gate.reason) for gate in report.gates],
        title=str(report.ref),
    )
    console.print(f"{report.ref}: {report.verdict}. {report.reason}", highlight=False, markup=False, soft_wrap=True)
