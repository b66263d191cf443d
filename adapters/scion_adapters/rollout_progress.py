"""How far a rollout's present step is, for people to read. Decides nothing."""

from __future__ import annotations

from dataclasses import dataclass

from scion_adapters import analysis
from scion_adapters.clock import Clock
from scion_adapters.controller import requests_on_step, votes_since
from scion_adapters.database import Database, time_in
from scion_adapters.records import Rollout, VersionRef
from scion_adapters.replicas import heartbeat_ttl_s as ttl_of
from scion_adapters.replicas import lacking, live_in, settle
from scion_adapters.rollout_plan import format_duration
from scion_adapters.settings import Settings
from scion_adapters.versions import load_version


@dataclass(frozen=True, slots=True)
class Progress:
    """Of the present step: seconds and answers; of the servers: how many live and hold the version; of the votes: the
    shares of users (mean over users, 0..1) who like challenger and champion, None without votes, and the verdict."""

    elapsed_s: float
    every_s: float | None
    answers: int
    after_requests: int | None
    num_live: int
    num_loaded: int
    liked: float | None
    champion_liked: float | None
    num_users: int
    champion_num_users: int
    verdict: str
    is_active: bool

    @property
    def step_text(self) -> str | None:
        if not self.is_active:
            return None
        if self.after_requests is not None:
            return f"{self.answers} of {self.after_requests} answers"
        return f"{format_duration(int(self.elapsed_s))} of {format_duration(self.every_s or 0.0)}"

    @property
    def loaded_text(self) -> str | None:
        return f"{self.num_loaded} of {self.num_live}" if self.is_active else None

    @property
    def liked_text(self) -> str | None:
        """`91% : 88% (inconclusive)`: challenger, champion, and what may be concluded."""
        if self.liked is None and self.champion_liked is None:
            return None
        shares = [("-" if share is None else f"{share:.0%}") for share in (self.liked, self.champion_liked)]
        return f"{shares[0]} : {shares[1]} ({self.verdict})"


def read_progress(database: Database, rollout: Rollout, settings: Settings, clock: Clock | None = None) -> Progress:
    """Read it in one transaction."""
    settle(database, clock)
    with database.read() as connection:
        now_s = time_in(connection, clock)
        lora_id = load_version(connection, VersionRef(rollout.adapter, rollout.number)).lora_id
        live = live_in(connection, now_s, ttl_of(settings))
        numbers = (rollout.stable, rollout.number)
        votes = analysis.votes_in(connection, rollout.adapter, numbers, votes_since(rollout), rollout_id=rollout.id)
        answers = requests_on_step(connection, rollout)
    champion, challenger = votes[rollout.stable], votes[rollout.number]
    return Progress(
        elapsed_s=max(now_s - rollout.step_started_at, 0.0),
        every_s=rollout.every_s,
        answers=answers,
        after_requests=rollout.after_requests,
        num_live=len(live),
        num_loaded=len(live) - len(lacking(live, lora_id)),
        liked=challenger.mean if challenger.users else None,
        champion_liked=champion.mean if champion.users else None,
        num_users=challenger.users,
        champion_num_users=champion.users,
        verdict=analysis.judge(champion, challenger).verdict,
        is_active=rollout.state.is_active,
    )
