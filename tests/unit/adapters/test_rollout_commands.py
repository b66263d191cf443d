"""`scion rollout` and `scion rollback` as a person or a script types them, on SQLite and without a server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from scion_adapters import transitions
from scion_adapters.cli import rollout_commands, status_commands
from scion_adapters.clock import now
from scion_adapters.database import Database
from scion_adapters.errors import ConflictError, InvalidInputError, NotFoundError, ScionError, UnavailableError
from scion_adapters.events import list_events
from scion_adapters.records import RolloutState, VersionState
from scion_adapters.rollouts import Rollouts
from scion_adapters.routing import load_routing, read_revision
from scion_adapters.transitions import Cause
from tests.helpers.databases import sqlite_database
from tests.helpers.rollouts import add_completion, add_version, lora_id_of, make_replica, report

CONFIG = """
[database]
url = "sqlite:///scion.db"
[rollout]
steps = [0.2, 1.0]
every_s = 120
guard = false
poll_interval_s = 0.01
"""


class Shell:
    """`scion` in a folder where chat:1 serves and chat:2 to chat:4 are accepted."""

    def __init__(self, directory: Path) -> None:
        (directory / "scion.toml").write_text(CONFIG)
        self.database = sqlite_database(directory)
        for number in (1, 2, 3, 4):
            add_version(self.database, number)
        self.rollouts = Rollouts(self.database)
        self.app = typer.Typer()
        rollout_commands.register(self.app)

    def run(self, *arguments: str) -> Result:
        """The result of a command that ends with exit code 0; errors of ours are raised."""
        result = self.invoke(*arguments)
        assert result.exit_code == 0, result.output
        return result

    def invoke(self, *arguments: str) -> Result:
        result = CliRunner().invoke(self.app, list(arguments))
        if isinstance(result.exception, ScionError):
            raise result.exception
        return result

    def json(self, *arguments: str) -> Any:
        return json.loads(self.run(*arguments, "--json").stdout)

    def serve(self, *numbers: int, revision: int | None = None, name: str = "host:1") -> None:
        """A live server that holds `numbers` and acts on the newest routing, unless `revision` says otherwise."""
        acts_on = read_revision(self.database) if revision is None else revision
        loaded = {lora_id_of("chat", number) for number in numbers}
        report(self.database, make_replica(name, loaded=loaded, heartbeat_at=now(), routing_revision=acts_on))


@pytest.fixture
def shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Shell]:
    monkeypatch.setenv("SCION_CONFIG", str(tmp_path / "scion.toml"))
    monkeypatch.setenv("SCION_ACTOR", "tester")
    shell = Shell(tmp_path)
    shell.run("rollout", "start", "chat:1")
    shell.run("rollout", "promote", "chat")
    yield shell
    shell.database.dispose()


def test_start_takes_the_configured_plan(shell: Shell) -> None:
    data = shell.json("rollout", "start", "chat:2", "-m", "better manners")
    assert (data["version"], data["state"], data["weight"], data["steps"]) == ("chat:2", "progressing", 0.0, [0.2, 1.0])
    assert (data["every_s"], data["after_requests"], data["guard"]) == (120.0, None, False)
    event = list_events(shell.database, limit=1000)[-1]
    assert (event.kind, event.actor, event.reason) == ("rollout.started", "tester", "better manners")


def test_start_takes_what_is_typed(shell: Shell) -> None:
    data = shell.json("rollout", "start", "chat:2", "--steps", "10%, 0.5, 100%", "--every", "1h30m", "--guard")
    assert (data["steps"], data["every_s"], data["guard"]) == ([0.1, 0.5, 1.0], 5400.0, True)
    shell.run("rollout", "abort", "chat")
    data = shell.json("rollout", "start", "chat:2", "--after-requests", "50", "--no-guard")
    assert (data["every_s"], data["after_requests"], data["guard"]) == (None, 50, False)


WRONG = [
    (["start", "chat"], InvalidInputError, "'chat' is not a version"),
    (["start", "chat:9"], NotFoundError, "chat:9 does not exist"),
    (["start", "chat:2", "--steps", "10,50,100"], InvalidInputError, "did you mean 10%"),
    (["start", "chat:2", "--every", "5"], InvalidInputError, "did you mean 5s or 5m"),
    (["start", "chat:2", "--every", "5m", "--after-requests", "5"], InvalidInputError, "either every_s or after"),
    (["start", "chat:2", "--wait", "--timeout", "soon"], InvalidInputError, "timeout: 'soon' is not a duration"),
    (["pause", "chat"], ConflictError, "no active rollout"),
    (["status", "chit"], NotFoundError, "no adapter 'chit'"),
]


@pytest.mark.parametrize(("arguments", "error", "says"), WRONG)
def test_wrong_input_is_refused(shell: Shell, arguments: list[str], error: type[ScionError], says: str) -> None:
    with pytest.raises(error, match=says):
        shell.invoke("rollout", *arguments)
    assert shell.rollouts.active("chat") is None


def test_the_verbs(shell: Shell) -> None:
    shell.run("rollout", "start", "chat:2")
    assert shell.json("rollout", "pause", "chat", "-m", "lunch")["state"] == "paused"
    assert "chat:2 progressing at 0% of users" in shell.run("rollout", "resume", "chat").output
    assert shell.json("rollout", "promote", "chat")["state"] == "promoted"
    assert shell.json("rollout", "start", "chat:3")["stable"] == 2
    assert "aborted by tester: rude" in shell.run("rollout", "abort", "chat", "-m", "rude").output
    assert {event.actor for event in list_events(shell.database, adapter="chat", limit=1000)} == {"tester"}


def test_status_shows_what_runs_and_with_a_name_what_ended(shell: Shell) -> None:
    assert "No rollout runs" in shell.run("rollout", "status").output
    assert shell.json("rollout", "status") == []
    assert [r["state"] for r in shell.json("rollout", "status", "chat")] == ["promoted"]
    rollout_id = shell.json("rollout", "start", "chat:2", "--after-requests", "5")["id"]
    shell.serve(1, 2)
    shell.serve(1, name="host:2")
    at = now() + 1
    add_completion(shell.database, 2, rollout_id=rollout_id, at=at, user="ann", vote=1.0)
    add_completion(shell.database, 1, rollout_id=rollout_id, at=at, user="ben", vote=0.0)
    (shown,) = shell.json("rollout", "status")
    progress = shown["progress"]
    assert (shown["id"], progress["answers"], progress["after_requests"]) == (rollout_id, 1, 5)
    assert (progress["num_loaded"], progress["num_live"]) == (1, 2)
    assert (progress["liked"], progress["champion_liked"], progress["verdict"]) == (1.0, 0.0, "inconclusive")
    text = " ".join(shell.run("rollout", "status").output.split())
    for part in ("chat:2", "0/2", "1 of 5 answers", "1 of 2", "100% : 0% (inconclusive)"):
        assert part in text
    assert len(shell.json("rollout", "status", "chat")) == 2
    assert len(shell.json("rollout", "status", "chat", "-n", "1")) == 1


def test_a_promoted_version_has_all_users_and_an_aborted_one_no_share(shell: Shell) -> None:
    shell.run("rollout", "start", "chat:2")
    assert "chat:2 promoted at 100% of users (" in shell.run("rollout", "promote", "chat").output
    shell.run("rollout", "start", "chat:3")
    assert shell.json("rollout", "promote", "chat")["weight"] == 1.0
    shell.run("rollout", "start", "chat:4")
    assert "chat:4 aborted (" in shell.run("rollout", "abort", "chat").output
    weights = {data["version"]: data["weight"] for data in shell.json("rollout", "status", "chat")}
    assert weights == {"chat:1": 1.0, "chat:2": 1.0, "chat:3": 1.0, "chat:4": 0.0}


def test_the_whole_status_names_a_rollouts_version_and_share(shell: Shell) -> None:
    status_commands.register(shell.app)
    started = shell.json("rollout", "start", "chat:2")
    (shown,) = shell.json("status")["rollouts"]
    assert shown == started
    assert (shown["version"], shown["weight"]) == ("chat:2", 0.0)


class Later(threading.Thread):
    """Does `work` as soon as `ready` is true: what a server or another person does while a command waits."""

    def __init__(self, database: Database, kind: str, work: Any) -> None:
        super().__init__(daemon=True)
        self.database, self.kind, self.work = database, kind, work
        self.seen = len(list_events(database, limit=1000))
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.wait(0.005):
            if any(event.kind == self.kind for event in list_events(self.database, limit=1000)[self.seen :]):
                self.work()
                return

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.join(10)


def test_start_wait_returns_with_the_end(shell: Shell) -> None:
    def steps_then_promotes() -> None:
        rollout = shell.rollouts.active("chat")
        assert rollout is not None
        with shell.database.write() as connection:
            transitions.set_step(connection, rollout, 1, "step 2 of 2", Cause("controller", "", now()))
        shell.rollouts.promote("chat", actor="controller")

    with Later(shell.database, "rollout.started", steps_then_promotes):
        result = shell.run("rollout", "start", "chat:2", "--wait", "--json")
    ended = json.loads(result.stdout)
    assert (ended["state"], ended["weight"]) == ("promoted", 1.0)
    assert "waiting until all live servers have loaded it" in result.stderr
    assert "  100%  promoted by controller" in result.stderr


def test_start_wait_fails_when_it_is_aborted(shell: Shell) -> None:
    with Later(shell.database, "rollout.started", lambda: shell.rollouts.abort("chat", actor="ben", reason="rude")):
        result = shell.invoke("rollout", "start", "chat:2", "--wait")
    assert result.exit_code == 1
    assert "aborted by ben: rude" in result.stderr
    assert "0%  aborted" not in result.stderr


def test_start_wait_gives_up_after_the_timeout_and_the_rollout_goes_on(shell: Shell) -> None:
    with pytest.raises(UnavailableError, match=r"has not ended after 0.05 s, it goes on: waiting"):
        shell.invoke("rollout", "start", "chat:2", "--wait", "--timeout", "50ms")
    active = shell.rollouts.active("chat")
    assert active is not None
    assert active.state is RolloutState.PROGRESSING


def test_rollback_returns_to_the_version_before(shell: Shell) -> None:
    shell.run("rollout", "start", "chat:2")
    shell.run("rollout", "promote", "chat")
    data = shell.json("rollback", "chat", "-m", "rude")
    assert (data["from_number"], data["to_number"], data["pending"]) == (2, 1, False)
    assert load_routing(shell.database).adapters["chat"].champion == 1
    with pytest.raises(ConflictError, match="no previous version"):
        shell.invoke("rollback", "chat")
    assert "from 1 back to the base" in shell.run("rollback", "chat", "--to", "0").output


def test_rollback_to_an_older_version_says_that_it_is_loaded_first(shell: Shell) -> None:
    for number in (2, 3):
        shell.run("rollout", "start", f"chat:{number}")
        shell.run("rollout", "promote", "chat")
    output = " ".join(shell.run("rollback", "chat", "--to", "1").output.split())
    assert "from 3 back to chat:1, as soon as all servers have loaded it" in output


def test_rollback_wait_returns_when_all_servers_act_on_it(shell: Shell) -> None:
    shell.run("rollout", "start", "chat:2")
    shell.serve(1, 2)
    with Later(shell.database, "rollout.rolled_back", lambda: shell.serve(1, 2)):
        data = shell.json("rollback", "chat", "--wait")
    assert data["servers"] == ["host:1"]
    assert 0 < data["seconds"] < 60


def test_rollback_wait_names_the_servers_that_do_not_follow(shell: Shell) -> None:
    shell.run("rollout", "start", "chat:2")
    shell.serve(1, 2, name="slow:1")
    with pytest.raises(UnavailableError, match=r"not acted on after 0.05 s by slow:1; it is recorded"):
        shell.invoke("rollback", "chat", "--wait", "--timeout", "50ms")
    assert shell.rollouts.active("chat") is None  # done all the same


def test_rollback_wait_without_a_server(shell: Shell) -> None:
    shell.run("rollout", "start", "chat:2")
    assert "no server is live" in shell.run("rollback", "chat", "--wait").output


def test_rollback_wait_follows_a_pending_one_to_its_end(shell: Shell) -> None:
    for number in (2, 3):
        shell.run("rollout", "start", f"chat:{number}")
        shell.run("rollout", "promote", "chat")
    with Later(shell.database, "rollout.started", lambda: shell.rollouts.promote("chat", actor="controller")):
        data = shell.json("rollback", "chat", "--to", "1", "--wait")
    assert (data["pending"], data["state"], data["servers"]) == (True, "promoted", [])
    assert load_routing(shell.database).adapters["chat"].champion == 1


def test_rollback_to_a_version_that_was_rejected_since_is_refused(shell: Shell) -> None:
    add_version(shell.database, 9, state=VersionState.REJECTED, reason="it loops")
    with pytest.raises(ConflictError, match=r"chat:9 is rejected \(it loops\)"):
        shell.invoke("rollback", "chat", "--to", "9")
