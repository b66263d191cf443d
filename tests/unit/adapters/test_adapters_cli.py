"""The commands of this package, run as a user runs them, on SQLite and a tiny base."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import typer
from typer.testing import CliRunner

from scion_adapters.aliases import set_alias_in
from scion_adapters.cli.commands import register
from scion_adapters.errors import ConflictError, InvalidInputError, NotFoundError, RejectedError
from scion_adapters.records import CHALLENGER, CHAMPION, PREVIOUS, Replica, VersionRef
from scion_adapters.registry import Registry, open_registry
from scion_adapters.replicas import ReplicaLedger
from scion_adapters.retirement import quarantine
from scion_adapters.settings import load_settings
from tests.helpers.adapters import make_adapter, make_base


class Project:
    """A folder with a configuration and a base, and `scion` run in it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._app = typer.Typer()
        register(self._app)

    def run(self, *arguments: object) -> str:
        """What the command prints; its errors are raised."""
        return CliRunner().invoke(self._app, [str(a) for a in arguments], catch_exceptions=False).output

    def json(self, *arguments: object) -> Any:
        return json.loads(self.run(*arguments, "--json"))

    def exit_code(self, *arguments: object) -> int:
        return CliRunner().invoke(self._app, [str(a) for a in arguments]).exit_code

    def registry(self) -> Registry:
        return open_registry(load_settings())

    def adapter(self, name: str, **changes: Any) -> Path:
        return make_adapter(self.directory / name, self.directory / "base", **changes)

    def accept(self, number: int, *aliases: str) -> None:
        registry = self.registry()
        registry.accept(VersionRef("chat", number), actor="gates", reason="passed", metrics={"margin": 0.5})
        with registry.database.write() as connection:
            for alias in aliases:
                set_alias_in(connection, "chat", alias, number, clock_value=1.0, actor="rollouts")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setenv("SCION_ACTOR", "tester")
    monkeypatch.setenv("SCION_CONFIG", str(tmp_path / "scion.toml"))
    project = Project(tmp_path)
    project.run("init", tmp_path, "--base", make_base(tmp_path / "base"))
    return project


def test_import_publishes_a_candidate_of_the_champion(project: Project) -> None:
    first = project.json("adapters", "import", project.adapter("one"), "chat", "--reason", "by hand")
    assert (first["version"], first["state"], first["parent"]) == ("chat:1", "candidate", 0)
    assert (first["created_by"], first["recipe"]) == ("tester", "import")
    assert "evaluation_key" not in first
    project.accept(1, CHAMPION)
    assert project.json("adapters", "import", project.adapter("two", seed=2), "chat")["parent"] == 1
    assert project.json("adapters", "import", project.adapter("three", seed=3), "code")["version"] == "code:1"
    assert "chat:3" in project.run("adapters", "import", project.adapter("four", seed=4), "chat")


def test_import_follows_the_folder_that_was_typed(project: Project) -> None:
    (project.directory / "latest").symlink_to(project.adapter("one"))  # the user's own link, not one inside an adapter
    assert project.json("adapters", "import", project.directory / "latest", "chat")["version"] == "chat:1"


def test_import_refuses_with_a_code_of_its_own(project: Project) -> None:
    bad = project.adapter("bad", config={"use_dora": True})
    with pytest.raises(RejectedError, match="use_dora"):
        project.run("adapters", "import", bad, "chat")
    with pytest.raises(RejectedError, match="max_lora_rank"):
        project.run("adapters", "import", project.adapter("wide", rank=17), "chat")
    assert [event["kind"] for event in project.json("events", "chat")] == ["version.refused", "version.refused"]


def test_list_and_show(project: Project) -> None:
    project.run("adapters", "import", project.adapter("one"), "chat")
    project.accept(1, CHAMPION)
    assert project.json("adapters", "list") == [{"adapter": "chat", "num_versions": 1, "aliases": {"champion": 1}}]
    assert "champion=1" in project.run("adapters", "list")

    shown = project.json("adapters", "show", "chat")
    assert [version["version"] for version in shown["versions"]] == ["chat:1"]
    assert shown["history"][0]["alias"] == "champion"
    assert "chat:1" in project.run("adapters", "show", "chat")

    version = project.json("adapters", "show", "chat@champion")
    assert (version["version"], version["metrics"], version["aliases"]) == ("chat:1", {"margin": 0.5}, ["champion"])
    assert "metrics.margin" in project.run("adapters", "show", "chat:1")


def test_show_names_the_reports(project: Project) -> None:
    project.run("adapters", "import", project.adapter("one"), "chat")
    (project.registry().store.report_path(VersionRef("chat", 1)) / "report.html").touch()
    assert project.json("adapters", "show", "chat:1")["report"] == [
        str(project.directory / "artifacts/reports/chat/1/report.html")
    ]


def test_diff(project: Project) -> None:
    project.run("adapters", "import", project.adapter("one"), "chat")
    project.run("adapters", "import", project.adapter("two", seed=2, rank=8), "chat")
    found = project.json("adapters", "diff", "chat:1", "chat:2")
    assert found["metadata"]["rank"] == [4, 8]
    assert len(found["modules"]) == 15  # 14 and the total
    assert found["modules"][-1]["module"] == "total"
    assert found["modules"][-1]["relative"] > 0.5
    text = project.run("adapters", "diff", "chat:0", "chat:2")
    assert "model.layers.1.mlp.down_proj" in text
    assert "total" in text


def test_export_and_import_again(project: Project) -> None:
    original = project.adapter("one")
    project.run("adapters", "import", original, "chat")
    out = project.directory / "out"
    assert project.json("adapters", "export", "chat:1", out)["directory"] == str(out)
    assert {f.name: f.read_bytes() for f in out.iterdir()} == {f.name: f.read_bytes() for f in original.iterdir()}
    again = project.json("adapters", "import", out, "chat")
    assert again["digest"] == project.json("adapters", "show", "chat:1")["digest"]
    with pytest.raises(ConflictError, match="exists already"):
        project.run("adapters", "export", "chat:1", out)
    with pytest.raises(NotFoundError, match="the base itself"):
        project.run("adapters", "export", "chat:0", project.directory / "base-out")


def test_export_notices_damage(project: Project) -> None:
    project.run("adapters", "import", project.adapter("one"), "chat")
    registry = project.registry()
    weights = registry.store.path(registry.version(VersionRef("chat", 1)).digest) / "adapter_model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    with pytest.raises(RejectedError, match="changed after publishing"):
        project.run("adapters", "export", "chat:1", project.directory / "out")


def test_alias(project: Project) -> None:
    project.run("adapters", "import", project.adapter("one"), "chat")
    project.accept(1)
    assert project.json("adapters", "alias", "chat", "stable", 1, "-m", "good")["aliases"] == {"stable": 1}
    assert project.json("events", "chat")[-1]["reason"] == "good"
    assert "no aliases" in project.run("adapters", "alias", "chat", "stable", "--remove")
    for arguments in (("chat", "stable"), ("chat", "stable", 1, "--remove")):
        with pytest.raises(InvalidInputError, match="either"):
            project.run("adapters", "alias", *arguments)


def replica(**changes: Any) -> Replica:
    values: dict[str, Any] = {
        "id": "host:1", "host": "host", "pid": 1, "url": "http://host:8000", "started_at": 0.0, "heartbeat_at": 0.0,
        "max_loras": 4, "max_cpu_loras": 8, "max_lora_rank": 16, "loaded": frozenset(), "failed": {}, "in_flight": {},
        "routing_revision": 0, "base_fingerprint": "sha256:0",
    }  # fmt: skip
    return Replica(**{**values, **changes})


def report(project: Project, **changes: Any) -> None:
    ReplicaLedger(project.registry().database).report(replica(**changes))


def test_status_shows_who_serves_what(project: Project) -> None:
    for number in (1, 2, 3):
        project.run("adapters", "import", project.adapter(f"v{number}", seed=number), "chat")
    project.accept(1, CHAMPION)
    project.accept(2, CHALLENGER, PREVIOUS)
    registry = project.registry()
    registry.set_alias("chat", "mine", 1, actor="tester")
    registry.request_evaluation(VersionRef("chat", 3))
    report(project, loaded=frozenset({1, 99}), failed={2: "no such file"}, in_flight={1: 2})

    found = project.json("status")
    (adapter,) = found["adapters"]
    assert (adapter["champion"], adapter["challenger"], adapter["previous"]) == (1, 2, 2)
    assert (adapter["aliases"], adapter["evaluating"]) == ({"mine": 1}, [3])
    assert adapter["states"] == {"accepted": 2, "candidate": 1}
    (server,) = found["replicas"]
    assert server["loaded"] == ["chat:1", "LoRA id 99"]
    assert server["failed"] == {"chat:2": "no such file"}
    assert (server["in_flight"], server["behind"]) == (2, True)
    assert (found["num_feedback"], found["journal_bytes"], found["runs"], found["rollouts"]) == (0, None, [], [])
    text = project.run("status")
    assert "no such file" in text
    assert "(evaluating 3)" in text


def test_status_of_an_empty_world(project: Project) -> None:
    assert project.json("status")["replicas"] == []
    assert "base" in project.run("status")
    (project.directory / "journal").mkdir()
    (project.directory / "journal/segment").write_bytes(bytes(2048))
    assert project.json("status")["journal_bytes"] == 2048
    assert "journal: 2.0 KiB" in project.run("status")


def test_a_silent_server_is_not_shown(project: Project) -> None:
    ReplicaLedger(project.registry().database, lambda: 1.0).report(replica())
    assert project.json("status")["replicas"] == []


def test_events(project: Project) -> None:
    for number in (1, 2, 3):
        project.run("adapters", "import", project.adapter(f"v{number}", seed=number), "chat")
    assert [event["number"] for event in project.json("events")] == [1, 2, 3]
    assert [event["number"] for event in project.json("events", "chat", "--limit", 2)] == [2, 3]
    assert [event["number"] for event in project.json("events", "--after", 2)] == [3]
    assert "version.published" in project.run("events")
    with pytest.raises(NotFoundError, match="no adapter"):
        project.run("events", "nobody")


def test_init_refuses_to_overwrite(project: Project) -> None:
    with pytest.raises(ConflictError, match="--force"):
        project.run("init", project.directory)
    assert project.json("init", project.directory, "--force")["file"] == str(project.directory / "scion.toml")
    assert load_settings().base.model == "base"


def test_init_prints_without_writing(project: Project, tmp_path: Path) -> None:
    text = project.run("init", tmp_path / "other", "--print", "--base", "org/model")
    assert 'model = "org/model"' in text
    assert not (tmp_path / "other").exists()


def test_db(project: Project) -> None:
    shown = project.json("db", "show")
    assert (shown["revision"], shown["current"]) == (None, False)
    assert "scion db upgrade" in project.run("db", "show")
    upgraded = project.json("db", "upgrade")
    assert (upgraded["before"], upgraded["after"]) == (None, shown["head"])
    assert project.json("db", "show")["current"] is True
    assert "newest" in project.run("db", "upgrade")


def test_a_database_of_a_newer_program_is_named_by_every_command(project: Project) -> None:
    project.run("db", "upgrade")
    with project.registry().database.write() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    result, detail = checks(project)["database"]
    assert result == "failed"
    assert "revision 9999" in detail
    assert "run that version" in detail
    for command in ("db upgrade", "db show", "adapters list", "rollback chat", "status"):
        with pytest.raises(ConflictError, match="run that version"):
            project.run(*command.split())


def checks(project: Project) -> dict[str, tuple[str, str]]:
    return {check["name"]: (check["result"], check["detail"]) for check in project.json("doctor")["checks"]}


def test_doctor_on_a_good_project(project: Project) -> None:
    found = checks(project)
    assert [found[name][0] for name in ("configuration", "base", "database", "store", "servers")] == [
        "ok", "ok", "ok", "ok", "warning",
    ]  # fmt: skip
    assert "scion serve" in found["servers"][1]
    assert re.search(r"sha256:[0-9a-f]{64}", found["base"][1])
    assert "ok base" in re.sub(r" +", " ", project.run("doctor"))
    assert project.json("db", "show")["revision"] is None  # looking changed nothing


def test_doctor_compares_the_servers_base(project: Project) -> None:
    report(project)
    assert checks(project)["servers"][0] == "failed"
    fingerprint = checks(project)["base"][1].split()[-1]
    report(project, base_fingerprint=fingerprint, failed={1: "out of memory"})
    assert "out of memory" in checks(project)["servers"][1]
    report(project, base_fingerprint=fingerprint)
    assert checks(project)["servers"] == ("ok", "1 running: http://host:8000")


def published(project: Project, count: int) -> None:
    for number in range(1, count + 1):
        project.run("adapters", "import", project.adapter(f"adapter-{number}", seed=number), "chat")
        project.accept(number)


def test_doctor_neither_makes_nor_blames_a_store_that_is_not_mounted(project: Project) -> None:
    published(project, 1)
    root = project.registry().store.root
    root.rename(root.with_name("unmounted"))
    for arguments in ((), ("--repair",)):
        assert project.exit_code("doctor", *arguments) == 1
        assert not root.exists()
    result, detail = checks(project)["leftovers"]
    assert result == "failed"
    assert "mount the store" in detail
    assert "--repair" not in detail
    assert [version.state for version in project.registry().versions("chat")] == ["accepted"]


def test_doctor_mends_the_rest_when_one_thing_cannot_be_mended(project: Project) -> None:
    published(project, 2)
    registry = project.registry()
    first, second = registry.versions("chat")
    for version in (first, second):
        quarantine(registry.database, version.ref, actor="server-1", reason="gone")
    weights = registry.store.path(first.digest) / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    (found,) = [check for check in project.json("doctor", "--repair")["checks"] if check["name"] == "leftovers"]
    assert found["result"] == "failed"
    assert "chat:1 is quarantined and its files are back: verify and reinstate it failed: " in found["detail"]
    assert "changed after publishing" in found["detail"]
    assert "chat:2 is quarantined and its files are back: verify and reinstate it (done)" in found["detail"]
    assert [version.state for version in registry.versions("chat")] == ["quarantined", "accepted"]


# what is broken, the check that says so, a piece of what it says
BROKEN = [
    ("[base]\nmodel = 'nowhere'\n", "base", "hf download"),  # no base
    ("[server]\nport = 'x'\n", "configuration", "server.port"),  # a wrong value
    ("[base]\nmodel = 'base'\n[server]\ntarget_modules = ['c_attn']\n", "base", "c_attn"),  # names of another family
    ("[store]\nurl = '/proc/nowhere'\n", "store", "nowhere"),  # a folder that cannot be made
    ("[database]\nurl = 'postgresql+psycopg://nobody@127.0.0.1:1/none'\n", "database", "does not answer"),  # no server
]


@pytest.mark.parametrize(("text", "name", "piece"), BROKEN)
def test_doctor_says_what_is_broken(project: Project, text: str, name: str, piece: str) -> None:
    (project.directory / "scion.toml").write_text(text)
    result, detail = checks(project)[name]
    assert result == "failed"
    assert piece in detail
    assert project.exit_code("doctor") == 1
