from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from scion_adapters.errors import ConflictError, InvalidInputError, NotFoundError
from scion_adapters.records import RolloutState, Run, RunState, VersionState
from scion_adapters.settings import CONFIG_ENV
from scion_trainer import cli, followup, launch, runs_cli
from scion_trainer.gates import GATES
from scion_trainer.recipes import RECIPES
from scion_trainer.runs import RunStore
from tests.helpers.training import Project, make_project


def app() -> typer.Typer:
    application = typer.Typer()
    cli.register(application)
    return application


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    base = tmp_path / "base"
    base.mkdir()
    project = make_project(tmp_path, base=base)
    monkeypatch.setenv(CONFIG_ENV, str(project.file))
    yield project
    project.database.dispose()


def invoke(*arguments: str) -> Any:
    result = CliRunner().invoke(app(), list(arguments), catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.mark.parametrize("text", ["", "2", "2 hours", "-1h"])
def test_what_is_no_duration_is_refused_before_anything_begins(project: Project, text: str) -> None:
    with pytest.raises(InvalidInputError, match=r"since: .* is not a duration") as caught:
        invoke("train", "chat", "--since", text)
    assert caught.value.field == "since"


def test_the_recipes_of_the_command_are_those_there_are() -> None:
    assert {str(name) for name in cli.RecipeName} == {"auto", *RECIPES}
    assert GATES  # what `evaluate` runs


def test_resume_takes_the_run_as_it_is(project: Project) -> None:
    with pytest.raises(InvalidInputError, match="leave out --recipe"):
        invoke("train", "chat", "--resume", "--recipe", "sft")
    with pytest.raises(NotFoundError, match="no unfinished run"):
        invoke("train", "chat", "--resume")


def test_the_daemon_needs_something_to_wait_for(project: Project) -> None:
    with pytest.raises(InvalidInputError, match=r"trainer\.schedule or trainer\.min_new_ratings"):
        invoke("trainer")


@pytest.mark.parametrize("command", ["train chat", "evaluate chat:1", "trainer", "red-team run chat:1"])
def test_every_process_that_loads_torch_is_bound_to_the_trainers_cores(
    project: Project, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("SCION_TRAINER__CORES", "4000-4001")
    monkeypatch.setenv("SCION_TRAINER__SCHEDULE", "0 3 * * *")
    with pytest.raises(InvalidInputError, match=r"4000-4001.*this machine allows"):
        invoke(*command.split())


def fake_launch(project: Project, monkeypatch: pytest.MonkeyPatch) -> list[Run]:
    """Let runs publish a real candidate without training; returns the runs that were launched."""
    from scion_adapters.fingerprint import read_base
    from scion_adapters.preflight import AdapterLimits
    from scion_adapters.registry import open_registry
    from scion_adapters.sections.serving import LORA_TARGETS
    from tests.helpers.adapters import make_adapter, make_base

    launched: list[Run] = []
    base = read_base(make_base(project.directory / "numpy-base"))

    def fake(settings: Any, database: Any, run: Run, **_: Any) -> Run:
        launched.append(run)
        version = open_registry(settings, database).publish(
            run.adapter,
            make_adapter(project.directory / run.id, base, seed=len(launched)),
            parent=run.parent,
            base=base,
            limits=AdapterLimits(16, LORA_TARGETS),
            actor="test",
            run_id=run.id,
        )
        return RunStore(database).succeed(
            run.id,
            candidate=version.number,
            metrics={"rows": 40, "steps": 10, "train_loss": 0.5, "peak_rss_bytes": 1 << 30},
        )

    monkeypatch.setattr(launch, "launch_run", fake)
    return launched


def test_train_prints_the_candidate_and_what_to_type_next(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    launched = fake_launch(project, monkeypatch)
    result = invoke("train", "chat", "--recipe", "sft", "--no-evaluate")
    assert result.exit_code == 0
    assert launched[0].recipe == "sft"
    assert "chat:1" in result.stdout
    assert "next: scion evaluate chat:1" in result.stdout
    assert launched[0].id not in result.stdout  # what happens meanwhile goes to stderr


def test_train_json_is_one_document(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_launch(project, monkeypatch)
    document = json.loads(invoke("train", "chat", "--no-evaluate", "--since", "2h", "--json").stdout)
    assert (document["version"], document["state"], document["rollout"]) == ("chat:1", "candidate", None)
    assert document["run"]["recipe"] == "kto"  # as configured
    assert document["run"]["config"]["since"] == pytest.approx(document["run"]["created_at"] - 7200, abs=5)


class FakeReport:
    """What the gates said, as far as the command looks at it."""

    gates = ()
    verdict = "pass"
    reason = "all gates passed"
    exit_code = 0

    def __init__(self, ref: Any) -> None:
        self.ref = ref

    def to_json(self) -> dict[str, str]:
        return {"verdict": self.verdict}


@pytest.mark.parametrize(
    ("flags", "rollout", "next_command"),
    [
        ((), False, "scion rollout start chat:1"),  # accepted; a person decides
        (("--rollout",), True, "scion rollout status chat"),
    ],
)
def test_an_accepted_candidate_is_rolled_out_when_asked(
    project: Project, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], rollout: bool, next_command: str
) -> None:
    from scion_adapters.registry import open_registry
    from scion_adapters.rollouts import Rollouts

    fake_launch(project, monkeypatch)

    def accept(settings: Any, database: Any, ref: Any, **_: Any) -> FakeReport:
        open_registry(settings, database).accept(ref, actor="gates", reason="test")
        return FakeReport(ref)

    monkeypatch.setattr(followup, "evaluate_version", accept)
    result = invoke("train", "chat", *flags)
    assert result.exit_code == 0
    assert f"next: {next_command}" in result.stdout
    active = Rollouts(project.database).active("chat")
    assert (active is not None) is rollout
    if active is not None:
        assert (active.number, active.state) == (1, RolloutState.UNAPPROVED)  # nobody has approved a version yet
        assert active.steps == project.settings.rollout.steps


def test_a_rejected_candidate_sets_the_exit_code(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    from scion_adapters.registry import open_registry

    fake_launch(project, monkeypatch)

    def reject(settings: Any, database: Any, ref: Any, **_: Any) -> FakeReport:
        open_registry(settings, database).reject(ref, actor="gates", reason="it loops")
        report = FakeReport(ref)
        report.exit_code = 5
        return report

    monkeypatch.setattr(followup, "evaluate_version", reject)
    result = invoke("train", "chat", "--rollout")
    assert result.exit_code == 5
    assert "next: scion adapters show chat:1" in result.stdout


def test_without_a_server_the_version_stays_a_candidate(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    from scion_adapters.errors import UnavailableError
    from scion_adapters.records import VersionRef
    from scion_adapters.registry import open_registry

    fake_launch(project, monkeypatch)

    def away(*_: Any, **__: Any) -> FakeReport:
        raise UnavailableError("no server answers at http://127.0.0.1:8000")

    monkeypatch.setattr(followup, "evaluate_version", away)
    result = invoke("train", "chat")
    assert "chat:1 was not evaluated: no server answers" in result.stdout
    assert "next: scion evaluate chat:1" in result.stdout
    registry = open_registry(project.settings, project.database)
    assert registry.version(VersionRef("chat", 1)).state is VersionState.CANDIDATE


def test_runs_are_listed_and_shown(project: Project) -> None:
    run = launch.create_run(project.settings, project.database, "chat", "kto", actor="cli:ann")
    RunStore(project.database).start(run.id)
    listed = json.loads(invoke("runs", "list", "--json").stdout)
    assert [(entry["id"], entry["state"]) for entry in listed] == [(run.id, "running")]
    shown = json.loads(invoke("runs", "show", run.id, "--json").stdout)
    assert shown["actor"] == "cli:ann"
    assert shown["config"]["recipe"] == "kto"
    assert "interrupted" in invoke("runs", "show", run.id).stdout  # nobody works on it
    with pytest.raises(NotFoundError, match="run-nope"):
        invoke("runs", "show", "run-nope")


@pytest.mark.parametrize(
    ("state", "attempt", "is_worked_on", "shown"),
    [
        (RunState.QUEUED, 0, False, "queued"),  # about to begin
        (RunState.RUNNING, 1, True, "running"),
        (RunState.RUNNING, 1, False, "interrupted"),  # its process is gone
        (RunState.QUEUED, 1, False, "interrupted"),  # and that was noticed
        (RunState.FAILED, 1, False, "failed"),
        (RunState.SUCCEEDED, 2, False, "succeeded"),
    ],
)
def test_the_shown_state_tells_a_dead_run_from_a_working_one(
    state: RunState, attempt: int, is_worked_on: bool, shown: str
) -> None:
    run = Run("run-1", "chat", "kto", state, 0, {}, {}, "d", attempt, "a", 0.0, 0.0)
    assert runs_cli.shown_state(run, is_worked_on=is_worked_on) == shown


def test_a_second_run_is_refused(project: Project) -> None:
    from scion_trainer.run_lease import Holder, claim

    claim(project.database, "chat", Holder.of("run-first"))
    with pytest.raises(ConflictError, match="run-first"):
        invoke("train", "chat")
