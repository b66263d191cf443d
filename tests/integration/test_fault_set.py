"""The fault set: each bad adapter is refused with its own reason, through each door, before anything is loaded.

Doors: `Registry.publish`, `scion adapters import`, and `POST /v1/adapters/{name}/versions` in vLLM's real application,
whose fake engine records every load. A refusal leaves no version and no file behind, and an event that says why.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
import pytest_asyncio
import sqlalchemy as sa
import typer
from typer.testing import CliRunner

from scion_adapters import tables
from scion_adapters.cli.commands import register
from scion_adapters.errors import RejectedError
from scion_adapters.events import list_events
from scion_adapters.fingerprint import base_info
from scion_adapters.registry import limits_of
from tests.helpers.adapters import make_adapter
from tests.helpers.faults import BAD_NAMES, CONFIG, FAULTS, WEIGHTS, Fault, linked, linked_directory
from tests.helpers.plugin_world import PluginWorld
from tests.helpers.waiting import until

pytestmark = pytest.mark.asyncio(loop_scope="module")
DOORS = ("registry", "cli", "http")
Refusal = tuple[str, str]  # reason, message


class Doors:
    """A running server and the three ways in."""

    def __init__(self, world: PluginWorld, client: httpx.AsyncClient) -> None:
        self.world = world
        self.client = client

    async def refusal(self, door: str, directory: Path, name: str = "chat", digest: str | None = None) -> Refusal:
        """Try to publish. Fails when it is not refused, when it leaves anything behind, or no event."""
        before = self.left_behind()
        last = max((event.id for event in list_events(self.world.database, newest=True)), default=0)
        reason, message = await {"registry": self._registry, "cli": self._cli, "http": self._http}[door](
            directory, name, digest
        )
        assert self.left_behind() == before
        events = list_events(self.world.database, after_id=last)
        assert [(event.kind, event.data["check"]) for event in events] == [("version.refused", reason)]
        assert (events[0].reason, events[0].adapter) == (message, None if reason == "invalid_name" else name)
        return reason, message

    def left_behind(self) -> tuple[object, ...]:
        """All that a bad adapter could have left: rows, files, loads."""
        with self.world.database.read() as connection:
            rows = [connection.execute(sa.select(table)).all() for table in (tables.adapters, tables.versions)]
        files = sorted(path for path in self.world.registry.store.root.rglob("*") if not path.is_dir())
        staged = list((self.world.registry.store.root / "tmp").glob("*"))
        return rows, files, staged, tuple(self.world.app.engine.calls)

    async def _registry(self, directory: Path, name: str, digest: str | None) -> Refusal:
        settings = self.world.settings
        with pytest.raises(RejectedError) as caught:
            self.world.registry.publish(
                name,
                directory,
                parent=0,
                base=base_info(settings),
                limits=limits_of(settings),
                actor="test",
                digest=digest,
            )
        return caught.value.reason, str(caught.value)

    async def _cli(self, directory: Path, name: str, digest: str | None) -> Refusal:
        app = typer.Typer()
        register(app)
        arguments = ["adapters", "import", *(["--digest", digest] if digest else []), "--", str(directory), name]
        environment = {"SCION_CONFIG": str(self.world.home / "scion.toml")}
        result = await asyncio.to_thread(CliRunner().invoke, app, arguments, env=environment)
        assert isinstance(result.exception, RejectedError), result.output
        return result.exception.reason, str(result.exception)

    async def _http(self, directory: Path, name: str, digest: str | None) -> Refusal:
        files = parts(directory)
        data = {"digest": digest} if digest else {}
        path = quote(name, safe="").replace(".", "%2E")  # or the client would walk up `..` by itself
        response = await self.client.post(f"/v1/adapters/{path}/versions", files=files, data=data)
        assert response.status_code == 422, response.text
        error = response.json()["error"]
        assert error["type"] == "invalid_request_error"
        return error["code"], error["message"]


def parts(directory: Path) -> list[tuple[str, bytes]]:
    return [(file.name, file.read_bytes()) for file in sorted(directory.iterdir())]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def doors(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Doors]:
    world = PluginWorld(tmp_path_factory.mktemp("doors"))
    async with world.serving() as client:
        yield Doors(world, client)
    world.close()


@pytest.mark.parametrize(
    ("fault", "door"),
    [(fault, door) for fault in FAULTS for door in DOORS if door != "http" or not fault.only_directory],
    ids=lambda value: value.name if isinstance(value, Fault) else value,
)
async def test_it_is_refused_before_it_is_loaded(doors: Doors, tmp_path: Path, fault: Fault, door: str) -> None:
    directory = tmp_path / "bad"
    fault.make(directory, doors.world.base)
    reason, message = await doors.refusal(door, directory)
    assert reason == fault.reason
    assert fault.says in message


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(("name", "reason"), BAD_NAMES, ids=[ascii(name)[:20] for name, _ in BAD_NAMES])
async def test_a_good_adapter_under_a_bad_name_is_refused(
    doors: Doors, tmp_path: Path, name: str, reason: str, door: str
) -> None:
    found, message = await doors.refusal(door, make_adapter(tmp_path / "good", doors.world.base), name)
    assert found == reason
    assert message.isascii()  # a look-alike shows what it is
    assert message.isprintable()


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("digest", ["sha256:" + "0" * 64, "nonsense"])
async def test_files_with_another_digest_than_expected_are_refused(
    doors: Doors, tmp_path: Path, digest: str, door: str
) -> None:
    reason, message = await doors.refusal(door, make_adapter(tmp_path / "good", doors.world.base), digest=digest)
    assert reason == "digest_mismatch"
    assert "changed on the way" in message


async def test_the_good_adapter_behind_all_the_faults_is_served(doors: Doors) -> None:
    """The faults are refused for what they are; and this engine would have shown a load."""
    version = doors.world.champion()
    await until(lambda: doors.world.is_followed(version.number))
    assert len(doors.world.app.engine.calls) == 1
    assert doors.world.app.engine.calls[0].startswith(f"add {version.ref}")


async def test_a_hard_link_is_copied_and_no_longer_linked(doors: Doors, tmp_path: Path) -> None:
    world, directory = doors.world, make_adapter(tmp_path / "good", doors.world.base, seed=77)
    os.link(directory / WEIGHTS, tmp_path / "another-name")
    base, limits = base_info(world.settings), limits_of(world.settings)
    version = world.registry.publish("chat", directory, parent=0, base=base, limits=limits, actor="test")
    (tmp_path / "another-name").write_bytes(b"changed")
    world.registry.store.verify(version.digest)


# --- files that were changed after they were published ---


def flip_a_bit(directory: Path) -> None:
    raw = bytearray((directory / WEIGHTS).read_bytes())
    raw[-1] ^= 1
    (directory / WEIGHTS).write_bytes(raw)


# what is done to a stored version, and what the server says of it
CHANGED = [
    (flip_a_bit, "changed after publishing"),  # one bit, and the same size
    (lambda d: (d / CONFIG).write_text((d / CONFIG).read_text().replace("8", "9", 1)), "changed after publishing"),
    (lambda d: os.truncate(d / WEIGHTS, 100), "was it removed"),  # incomplete is not there
    (lambda d: (d / CONFIG).unlink(), "was it removed"),  # the same
    (lambda d: (d / "adapter_model.bin").touch(), "can run code"),  # which vLLM might prefer
    (linked(WEIGHTS), "symbolic link"),  # out of the store: the same bytes now, and what tomorrow?
    (linked_directory, "not a directory of its own"),  # all of it out of the store
]


@pytest.fixture
def changed_world(tmp_path: Path) -> Iterator[PluginWorld]:
    world = PluginWorld(tmp_path)
    yield world
    world.close()


@pytest.mark.parametrize(("change", "says"), CHANGED)
async def test_what_was_changed_after_publishing_is_not_loaded(
    changed_world: PluginWorld, change: object, says: str
) -> None:
    assert callable(change)
    version = changed_world.champion()
    change(changed_world.registry.store.path(version.digest))
    async with changed_world.serving() as client:
        plugin = changed_world.last_plugin.runtime
        assert plugin is not None
        failures = plugin.background.loader.failures
        assert says in failures[version.lora_id].reason
        assert changed_world.app.engine.calls == []
        assert (await client.get("/v1/scion/status")).json()["resident"] == []
