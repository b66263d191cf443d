"""`scion feedback` and `scion dataset`: what users said, and the training sets made of it. Imports lazily."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from rich.markup import escape

from scion_adapters.cli.output import JsonOption, console, error_console, format_time, print_json, print_table

if TYPE_CHECKING:
    from scion_adapters.database import Database
    from scion_adapters.settings import Settings
    from scion_feedback.feedback import FeedbackRow, FeedbackStore

AdapterArgument = Annotated[str | None, typer.Argument(help="Adapter; all of them when left out.", show_default=False)]


def register(app: typer.Typer) -> None:
    """Add `feedback` and `dataset` to `scion`."""
    feedback = typer.Typer(name="feedback", help="What users said about answers.", no_args_is_help=True)
    feedback.command()(stats)
    feedback.command()(show)
    feedback.command()(export)
    app.add_typer(feedback)
    dataset = typer.Typer(name="dataset", help="Frozen training sets.", no_args_is_help=True)
    dataset.command("build")(build_dataset)
    dataset.command("show")(show_dataset)
    app.add_typer(dataset)


def stats(adapter: AdapterArgument = None, as_json: JsonOption = False) -> None:
    """Votes per version: thumbs up and down, who voted, comments and corrections."""
    with _feedback_store() as (_, _, store):
        figures = store.stats(adapter)
    if as_json:
        print_json(figures.to_json())
        return
    print_table(
        ("version", "answers", "up", "down", "neutral", "share", "users", "comments", "corrections"),
        [
            (
                f"{v.adapter}:{v.number}",
                v.completions,
                v.up,
                v.down,
                v.neutral,
                None if v.share is None else f"{v.share:.1%}",
                v.users,
                v.comments,
                v.corrections,
            )
            for v in figures.versions
        ],
    )
    if figures.unmatched:
        console.print(f"{figures.unmatched} votes are about answers that are not recorded (yet).")


def show(
    feedback_id: Annotated[str, typer.Argument(metavar="ID", help="A vote's id, or an answer's id for all its votes.")],
    as_json: JsonOption = False,
) -> None:
    """Show a vote, or all votes about an answer, and what was said."""
    from scion_adapters.errors import NotFoundError
    from scion_feedback.captures import CompletionStore

    with _feedback_store() as (_, database, store):
        votes = store.for_completion(feedback_id)
        if not votes:
            votes = [store.get(feedback_id)]
        try:
            completion = CompletionStore(database).get(votes[0].completion_id)
        except NotFoundError:
            completion = None
    if as_json:
        data = [{**vote.to_json(), "user_hash": vote.user_hash, "source": vote.source} for vote in votes]
        print_json({"feedback": data, "completion": None if completion is None else completion.to_json()})
        return
    print_table(
        ("id", "at", "name", "value", "counts", "user", "choice", "comment", "correction"),
        [_shown_vote(vote) for vote in votes],
        title=escape(f"completion {votes[0].completion_id}"),
    )
    if completion is None:
        console.print("The answer is not recorded (yet).")
        return
    said = [*_shown_messages(completion.request), *(_shown_choice(choice) for choice in completion.choices)]
    print_table(("who", "said"), said, title=f"{completion.adapter}:{completion.number}")


def export(
    file: Annotated[str, typer.Argument(metavar="FILE", help="Where to write; - for standard output.")],
    adapter: Annotated[str | None, typer.Option("--adapter", help="Only votes about this adapter.")] = None,
    with_answers: Annotated[bool, typer.Option("--with-answers", help="Add what was asked and answered.")] = False,
) -> None:
    """Write all votes as JSON lines, in order of arrival. Users appear as keyed hashes only."""
    from scion_adapters.errors import NotFoundError
    from scion_feedback.captures import CompletionStore

    with _feedback_store() as (_, database, store), _output(file) as output:
        completions = CompletionStore(database)
        count = 0
        for vote in store.export(adapter):
            line = vote.to_json()
            if with_answers:
                try:
                    completion = completions.get(vote.row.completion_id)
                    line |= {"request": completion.request, "choices": completion.choices}
                except NotFoundError:
                    line |= {"request": None, "choices": None}
            output.write(json.dumps(line) + "\n")
            count += 1
    error_console.print(f"{count} votes exported.")


def build_dataset(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Adapter whose votes to freeze.")],
    since: Annotated[str | None, typer.Option("--since", help="Only votes this young, such as 2h or 7d.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Freeze a training set from the votes as they are now, as a run would."""
    from scion_adapters.artifacts import open_store
    from scion_adapters.rollout_plan import parse_duration
    from scion_feedback.snapshots import build_snapshot

    with _open() as (settings, database):
        snapshot = build_snapshot(
            database,
            open_store(settings).snapshots_path,
            adapter=name,
            heldout_share=settings.trainer.heldout_share,
            red_team_share=settings.trainer.red_team_share,
            newest_share=settings.trainer.newest_share,
            replay_share=settings.trainer.replay_share,
            seed=settings.trainer.seed,
            min_ratings=settings.trainer.min_ratings,
            max_age_days=settings.trainer.max_age_days,
            since=None if since is None else time.time() - parse_duration(since, field="since"),
        )
    _show_manifest(snapshot.manifest, snapshot.path, as_json)


def show_dataset(
    snapshot_id: Annotated[str, typer.Argument(metavar="ID", help="A snapshot's id, or how it begins.")],
    as_json: JsonOption = False,
) -> None:
    """Show what a training set holds, how it was split, and what was left out and why."""
    from scion_feedback.snapshots import find_snapshot

    with _open() as (_, database):
        snapshot = find_snapshot(database, snapshot_id)
    _show_manifest(snapshot.manifest, snapshot.path, as_json)


@contextmanager
def _open() -> Iterator[tuple[Settings, Database]]:
    from scion_adapters.database import open_database
    from scion_adapters.settings import load_settings

    settings = load_settings()
    database = open_database(settings)
    try:
        yield settings, database
    finally:
        database.dispose()


@contextmanager
def _feedback_store() -> Iterator[tuple[Settings, Database, FeedbackStore]]:
    from scion_feedback.feedback import FeedbackStore
    from scion_feedback.privacy import open_hasher

    with _open() as (settings, database):
        yield settings, database, FeedbackStore(database, open_hasher(settings))


@contextmanager
def _output(file: str) -> Iterator[TextIO]:
    """Standard output, or a file that appears under its name only when it is complete."""
    if file == "-":
        yield sys.stdout
        return
    path = Path(file).expanduser()
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8", opener=_private) as output:
            yield output
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _shown_vote(vote: FeedbackRow) -> tuple[object, ...]:
    counts = "yes" if vote.counts else "no, replaced"
    user = None if vote.user_hash is None else vote.user_hash[:8]
    at = format_time(vote.created_at)
    return vote.id, at, vote.name, vote.value, counts, user, vote.choice_index, vote.comment, vote.correction


def _shown_messages(request: Mapping[str, Any]) -> list[tuple[str, str]]:
    messages = request.get("messages")
    if isinstance(messages, list):
        return [(str(m.get("role")), str(m.get("content"))) for m in messages if isinstance(m, Mapping)]
    return [("prompt", str(request.get("prompt")))]


def _shown_choice(choice: Mapping[str, Any]) -> tuple[str, str]:
    message = choice.get("message")
    text = message.get("content") if isinstance(message, Mapping) else choice.get("text")
    return f"answer {choice.get('index', 0)}", str(text)


def _show_manifest(manifest: Mapping[str, Any], path: Path, as_json: bool) -> None:
    if as_json:
        print_json({**manifest, "path": str(path)})
        return
    split = manifest["split"]
    rows: list[tuple[str, object]] = [
        ("adapter", manifest["adapter"]),
        ("made", format_time(manifest["created_at"])),
        ("path", path),
        *((name, number) for name, number in manifest["counts"].items()),
        ("split", f"by {split['by']}, {split['heldout_share']:.0%} held out"),
        ("newest held out", f"{split.get('newest_share', 0.0):.0%}"),
        *((f"of {manifest['adapter']}:{number}", n) for number, n in manifest["versions"].items()),
        *((f"dropped: {reason}", n) for reason, n in manifest["dropped"].items()),
    ]
    print_table(("", ""), rows, title=manifest["id"])
