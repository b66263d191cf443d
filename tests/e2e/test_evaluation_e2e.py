"""The gates on real vLLM: the client keeps its contract; noise and no effect are rejected; traffic is unmoved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from scion_adapters import tables
from scion_adapters.errors import NotFoundError
from scion_adapters.fingerprint import base_info
from scion_adapters.records import RED_TEAM, Version, VersionState
from scion_adapters.registry import limits_of
from scion_adapters.settings import load_settings
from scion_trainer.chat_tokens import load_chat_tokens
from scion_trainer.evaluation import evaluate
from scion_trainer.gates.types import Verdict
from scion_trainer.report import Report
from scion_trainer.server_client import ServerClient
from tests.e2e.conftest import ServerWorld
from tests.helpers.adapters import Tensors, make_adapter
from tests.helpers.server_contract import CONTRACT, QUESTIONS, Subject

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def client(world: ServerWorld) -> Iterator[ServerClient]:
    with ServerClient(world.server.settings) as client:
        yield client


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
@pytest.mark.parametrize("model", ["base", "chat:1"])
def test_the_real_server_keeps_the_contract(
    world: ServerWorld, client: ServerClient, check: Callable[[Subject], None], model: str
) -> None:
    check(Subject(client, load_chat_tokens(world.server.settings), model))


def publish(world: ServerWorld, directory: Path, edit: Callable[[Tensors], None]) -> Version:
    settings = world.server.settings
    base = base_info(settings)
    made = make_adapter(directory, base, rank=16, alpha=32, edit=edit)
    return world.registry.publish("chat3", made, parent=0, base=base, limits=limits_of(settings), actor="test")


def evaluated(world: ServerWorld, version: Version) -> Report:
    few = {"gates": {"max_prompts": 12, "max_tokens": 32}}  # noise never ends by itself
    settings = load_settings(world.server.home / "scion.toml", overrides=few)
    return evaluate(settings, version.ref, database=world.database, registry=world.registry)


def times(factor: float) -> Callable[[Tensors], None]:
    def edit(tensors: Tensors) -> None:
        for tensor in tensors.values():
            tensor *= factor

    return edit


def test_noise_is_rejected_with_a_report_and_can_never_be_asked(world: ServerWorld, tmp_path: Path) -> None:
    champion = world.champion("chat3")
    version = publish(world, tmp_path / "noise", times(12))
    report = evaluated(world, version)
    assert report.verdict is Verdict.FAIL, report.reason
    assert "retention: drop_from_base" in report.reason
    assert "strange_share" in report.reason
    assert world.registry.version(version.ref).state is VersionState.REJECTED
    directory = world.registry.store.report_path(version.ref)
    assert (directory / "report.json").is_file()
    assert "<svg" in (directory / "report.html").read_text()
    world.wait_followed()
    with (
        ServerClient(world.server.settings, evaluation_keys={str(version.ref): version.evaluation_key}) as client,
        pytest.raises(NotFoundError),
    ):
        client.generate(str(version.ref), QUESTIONS[:1], max_tokens=4, temperature=0.0, seed=0)
    assert world.champion("chat3") == champion


def test_an_adapter_of_zeros_is_rejected_for_having_no_effect(world: ServerWorld, tmp_path: Path) -> None:
    report = evaluated(world, publish(world, tmp_path / "zeros", times(0)))
    assert report.verdict is Verdict.FAIL
    assert "effect" in report.reason
    assert report.figures["retention.drop_from_base"] == pytest.approx(0.0, abs=0.01)


def test_a_mild_change_passes_what_can_be_measured_and_is_not_recorded_as_traffic(
    world: ServerWorld, tmp_path: Path
) -> None:
    version = publish(world, tmp_path / "mild", times(2.5))
    report = evaluated(world, version)
    assert report.verdict is Verdict.PASS, report.reason
    assert "heldout unmeasurable" in report.reason  # there is no snapshot
    accepted = world.registry.version(version.ref)
    assert accepted.state is VersionState.ACCEPTED
    assert accepted.metrics["retention.drop_from_base"] == report.figures["retention.drop_from_base"]
    ordinary = world.ask("chat3").json()["id"]
    world.completion(ordinary)  # what came before it is recorded by now, too
    with world.database.read() as connection:
        query = sa.select(tables.completions.c.route)
        asked = query.where(tables.completions.c.adapter == "chat3", tables.completions.c.number == version.number)
        routes = connection.execute(asked).scalars().all()
    gate = report.gate("red_team")
    assert gate is not None
    assert routes == [RED_TEAM] * len(gate.findings)  # what failed a probe is kept, and nothing else
    assert 0 < len(routes) < gate.figures["probes"]
