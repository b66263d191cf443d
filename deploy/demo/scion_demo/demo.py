"""The demo, as one story: users chat and rate, the model learns from them live, and two bad versions are stopped.

Everything happens through the doors that an operator and an application have: `scion` commands and HTTP.

    result = await play(stage, profile, seed=0, max_rounds=3, console=console)
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from scion_demo.errors import DemoError
from scion_demo.profiles import Profile
from scion_demo.results import Incident, Result, Round
from scion_demo.sabotage import raiders, write_noise
from scion_demo.stage import CommandError, Stage
from scion_demo.turns import Turn, Vote, summarize
from scion_demo.users import run_traffic

ADAPTER = "chat"
NUM_USERS = 240
TURNS_PER_ROUND = 1100
RAID_TURNS = 240
CONCURRENCY = 16
TURNS_PER_S_WHILE_TRAINING = 3.0
"""Users keep talking while a version is trained; not so fast that they take its cores, or drown its ratings."""
GOOD_ENOUGH = (0.9, 0.85)
"""No further round when this share of votes is thumbs up after the first one, or after a later one, and no more than
`FORGETS_LITTLE` of accuracy is lost: a third round takes minutes, and gives little to those who are content."""
FORGETS_LITTLE = 0.02
VOTES_PER_WINDOW = 60


@dataclass(slots=True)
class Chronicle:
    """What happened so far, for the table and the plot."""

    started_s: float = field(default_factory=time.time)
    turns: list[Turn] = field(default_factory=list)
    marks: list[tuple[float, str]] = field(default_factory=list)

    def mark(self, text: str) -> None:
        self.marks.append(((time.time() - self.started_s) / 60, text))

    def windows(self) -> list[tuple[float, float]]:
        """(minute, thumbs-up share) over consecutive windows of votes."""
        voted = sorted((turn for turn in self.turns if turn.vote is not None), key=lambda turn: turn.started_at_s)
        windows = [voted[at : at + VOTES_PER_WINDOW] for at in range(0, len(voted), VOTES_PER_WINDOW)]
        return [
            (
                (window[-1].started_at_s - self.started_s) / 60,
                sum(turn.vote is Vote.UP for turn in window) / len(window),
            )
            for window in windows
            if len(window) > VOTES_PER_WINDOW // 2
        ]


async def play(
    stage: Stage,
    profile: Profile,
    *,
    seed: int,
    max_rounds: int,
    console: Console,
    chronicle: Chronicle,
) -> Result:
    """Play the whole demo on a stage whose server is not started yet; it is left running.

    Raises DemoError if a part of the system does not do what the demo is there to show.
    """
    say = console.print
    say("Starting vLLM on the NF4 base …")
    await stage.start_server()
    chronicle.mark("serving")
    rounds = [await _round(stage, profile, chronicle, console, seed=seed, number=0, trained_s=None)]
    while len(rounds) <= max_rounds and not _is_good_enough(rounds):
        trained_s = await _improve(stage, profile, chronicle, console, seed=seed, number=len(rounds))
        rounds.append(
            await _round(stage, profile, chronicle, console, seed=seed, number=len(rounds), trained_s=trained_s)
        )
    incidents = (
        await _noise(stage, chronicle, console, seed=seed),
        await _raid(stage, profile, chronicle, console, seed=seed),
    )
    failed = [turn for turn in chronicle.turns if turn.failed]
    return Result(
        prefer=profile.name,
        seed=seed,
        rounds=tuple(rounds),
        incidents=incidents,
        requests=sum(turn.num_requests for turn in chronicle.turns),
        failed_requests=len(failed),
        errors=tuple(turn.error or "" for turn in failed),
        seconds=time.time() - chronicle.started_s,
    )


def _is_good_enough(rounds: list[Round]) -> bool:
    """Liked by nearly all who vote honestly, and nothing forgotten for it."""
    first, last = rounds[0], rounds[-1]
    wanted = GOOD_ENOUGH[0 if len(rounds) == 2 else 1]
    return last.thumbs_up_share >= wanted and last.accuracy >= first.accuracy - FORGETS_LITTLE


async def _round(
    stage: Stage,
    profile: Profile,
    chronicle: Chronicle,
    console: Console,
    *,
    seed: int,
    number: int,
    trained_s: float | None,
) -> Round:
    """Users ask the present champion and rate it."""
    turns = await run_traffic(
        stage.base_url,
        profile,
        num_turns=TURNS_PER_ROUND,
        seed=seed * 1000 + number,
        num_users=NUM_USERS,
        concurrency=CONCURRENCY,
        on_turn=chronicle.turns.append,
    )
    total = summarize(turns).total
    versions = {turn.version for turn in turns if turn.version is not None}
    if len(versions) != 1 or total.thumbs_up_share is None or total.liked_share is None or total.accuracy is None:
        raise DemoError(
            f"round {number}: expected votes on one champion, got {total.num_votes} votes on {sorted(versions)}, "
            f"{total.num_failed} failed: see {stage.folder / 'server.log'}"
        )
    round_ = Round(
        version=versions.pop(),
        thumbs_up_share=total.thumbs_up_share,
        liked_share=total.liked_share,
        accuracy=total.accuracy,
        votes=total.num_votes,
        turns=total.num_turns,
        trained_s=trained_s,
    )
    console.print(
        f"[bold]Round {number}[/]: {round_.version} has {round_.thumbs_up_share:.0%} thumbs up "
        f"in {round_.votes} votes, "
        f"{round_.accuracy:.1%} of facts right",
        highlight=False,
    )
    return round_


async def _improve(
    stage: Stage, profile: Profile, chronicle: Chronicle, console: Console, *, seed: int, number: int
) -> float | None:
    """Train, gate and roll out a version while users go on.

    Returns the seconds it took, None if no version came of it.
    """
    started = time.monotonic()
    seed = seed * 1000 + 500 + 2 * number
    async with _background(stage, profile, chronicle, seed=seed, turns_per_s=TURNS_PER_S_WHILE_TRAINING):
        console.print("Training on the ratings while users go on …")
        trained = await stage.run("train", ADAPTER, "--recipe", "kto", show=True)
    version = _version(trained.output)
    if trained.code != 0 or version is None:
        console.print(f"  no new version: {trained.errors.strip().splitlines()[-1:]}", highlight=False)
        return None
    chronicle.mark(f"{version} trained")
    console.print(f"  {version} passed its gates; carrying it to users …", highlight=False)
    async with _background(stage, profile, chronicle, seed=seed + 1):
        await stage.must(
            "rollout", "start", version, "--steps", "10%,50%,100%", "--after-requests", "40", "--wait", show=True
        )
    chronicle.mark(f"{version} promoted")
    return time.monotonic() - started


async def _noise(stage: Stage, chronicle: Chronicle, console: Console, *, seed: int) -> Incident:
    """Publish an adapter of noise: finite, well formed, useless. A gate has to reject it."""
    console.print("Publishing a version of pure noise …")
    champion = await stage.must("adapters", "show", f"{ADAPTER}@champion")
    source, noise = stage.folder / "champion", stage.folder / "noise"
    await stage.must("adapters", "export", f"{ADAPTER}@champion", str(source))
    write_noise(source, noise, seed=seed)
    imported = await stage.must("adapters", "import", str(noise), ADAPTER)
    version = _version(imported)
    if version is None:
        raise DemoError(f"`scion adapters import` named no version: {imported}")
    evaluated = await stage.run("evaluate", version, show=True)
    state = (await stage.must("adapters", "show", version)) or {}
    refused = await stage.run("rollout", "start", version, "--steps", "100%", "--every", "1s")
    still = await stage.must("adapters", "show", f"{ADAPTER}@champion")
    chronicle.mark(f"{version} rejected")
    return Incident(
        name="a version of noise",
        version=version,
        outcome=f"{state.get('state')} by the gates (exit code {evaluated.code})",
        detail=str(state.get("reason") or ""),
        stopped=state.get("state") == "rejected" and refused.code != 0 and _version(still) == _version(champion),
    )


async def _raid(stage: Stage, profile: Profile, chronicle: Chronicle, console: Console, *, seed: int) -> Incident:
    """Raiders correct answers to a taste of theirs. Their version passes the gates; the users' votes take it back."""
    raid = raiders(profile)
    taste = raid.default_likes[0]
    console.print(f"A raid: accounts that want {taste} answers correct everything they get …", highlight=False)
    since = time.time()
    await run_traffic(
        stage.base_url,
        raid,
        num_turns=RAID_TURNS,
        seed=seed * 1000 + 900,
        num_users=60,
        user_prefix="raider",
        concurrency=CONCURRENCY,
        on_turn=chronicle.turns.append,
    )
    chronicle.mark("raid")
    champion = _version(await stage.must("adapters", "show", f"{ADAPTER}@champion"))
    seed = seed * 1000 + 950
    async with _background(stage, profile, chronicle, seed=seed, turns_per_s=TURNS_PER_S_WHILE_TRAINING):
        trained = await stage.run(
            "train", ADAPTER, "--recipe", "sft", "--since", f"{time.time() - since:.0f}s", show=True
        )
    version = _version(trained.output)
    if trained.code != 0 or version is None:
        raise CommandError(
            f"the raid's version did not get past the gates, so there is nothing to take back: {trained}"
        )
    console.print(f"  {version} passed its gates; users will tell …", highlight=False)
    async with _background(stage, profile, chronicle, seed=seed + 1):
        ended = await stage.run(
            "rollout", "start", version, "--steps", "25%,100%", "--every", "60s", "--wait", show=True
        )
    now = _version(await stage.must("adapters", "show", f"{ADAPTER}@champion"))
    chronicle.mark(f"{version} taken back")
    seen = [turn for turn in chronicle.turns if turn.version == version]
    return Incident(
        name=f"a version that learned {taste} answers from a raid",
        version=version,
        outcome=f"passed the gates, {len(seen)} answers, then taken back by the users' votes",
        detail=str((ended.output or {}).get("message") or ""),
        stopped=ended.code == 1 and now == champion,
    )


@asynccontextmanager
async def _background(
    stage: Stage, profile: Profile, chronicle: Chronicle, *, seed: int, turns_per_s: float | None = None
) -> AsyncIterator[None]:
    """Users go on asking and rating until the block ends; what they saw is in the chronicle."""
    ended = asyncio.Event()
    traffic = asyncio.create_task(
        run_traffic(
            stage.base_url,
            profile,
            until=ended,
            seed=seed,
            num_users=NUM_USERS,
            concurrency=CONCURRENCY,
            turns_per_s=turns_per_s,
            on_turn=chronicle.turns.append,
        )
    )
    try:
        yield
    finally:
        ended.set()
        await traffic


def _version(output: Any) -> str | None:
    """The `version` that a command's JSON names, such as `chat:3`."""
    version = output.get("version") if isinstance(output, dict) else None
    return version if isinstance(version, str) else None
