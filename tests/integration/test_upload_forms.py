"""The form of an upload: names that are paths, parts that nobody asked for, forms that end early, pieces of any size.

What the files hold is the fault set's (test_fault_set.py); here no adapter is looked at.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest
import pytest_asyncio

from scion_adapters.events import list_events
from tests.helpers.faults import CONFIG
from tests.helpers.plugin_world import PluginWorld
from tests.helpers.uploads import BOUNDARY, END, FORM, VERSIONS, body, file_part, leftovers, part
from vllm_scion import uploads
from vllm_scion.uploads import MAX_FIELD_BYTES

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[PluginWorld]:
    world = PluginWorld(tmp_path_factory.mktemp("forms"), config={"store": {"max_upload_mib": 1}})
    yield world
    world.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(world: PluginWorld) -> AsyncIterator[httpx.AsyncClient]:
    async with world.serving() as client:
        yield client


def last_event(world: PluginWorld) -> int:
    return max((event.id for event in list_events(world.database, newest=True)), default=0)


def refusals(world: PluginWorld, after_id: int) -> list[str]:
    events = list_events(world.database, after_id=after_id)
    return [event.data["check"] for event in events if event.kind == "version.refused"]


async def in_pieces(content: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(content), size):
        yield content[start : start + size]


REFUSED, INVALID = 422, 400
# a form, the status, the code, a piece of the message
FORMS = [
    (file_part("../evil", "x") + END, REFUSED, "path_in_name", "is a path"),  # a way out, as the part's name
    (file_part("/etc/cron.d/x", "x") + END, REFUSED, "path_in_name", "is a path"),  # an absolute one
    (file_part(CONFIG, "../../scion.toml") + END, REFUSED, "path_in_name", "is a path"),  # as the file's name
    (file_part(CONFIG, "/etc/passwd") + END, REFUSED, "path_in_name", "is a path"),  # absolute
    (file_part(CONFIG, "..\\\\..\\\\x") + END, REFUSED, "path_in_name", "is a path"),  # another system's
    (file_part(CONFIG, "..") + END, REFUSED, "path_in_name", "is a path"),  # the folder above
    (file_part("", "x") + END, REFUSED, "foreign_file", "''"),  # no name
    (file_part("adapter_cоnfig.json", "x") + END, REFUSED, "foreign_file", "u043e"),  # a Cyrillic о
    (file_part(CONFIG + "\0", "x") + END, REFUSED, "foreign_file", "x00"),  # where C would end
    (file_part("x" * 4000, "x") + END, REFUSED, "foreign_file", "does not belong"),  # longer than a path may be
    (file_part("adapter_model.bin", "x") + END, REFUSED, "not_safetensors", "can run code"),  # a pickle
    (file_part("manifest.json", "x") + END, REFUSED, "foreign_file", "does not belong"),  # the store's own
    (file_part(CONFIG, "x") * 2 + END, REFUSED, "duplicate_part", "two parts"),  # which of them would count?
    (part('name="parent"', "0") * 2 + END, REFUSED, "duplicate_part", "two parts"),  # the same of a field
    (part('name="run_id"', "run-1") + END, REFUSED, "foreign_file", "run_id"),  # not for callers
    (END, REFUSED, "unreadable", "no adapter_config"),  # a form of nothing
    (part('name="parent"', "-1") + END, INVALID, "invalid_value", "parent is"),
    (part('name="parent"', "9" * 10) + END, INVALID, "invalid_value", "parent is"),  # more than a column holds
    (part('name="parent"', "٧") + END, INVALID, "invalid_value", "parent is"),  # a digit, to Python
    (part('name="parent"', "7") + END, 404, "not_found", "chat:7 does not exist"),
    (part('name="reason"', "x" * (MAX_FIELD_BYTES + 1)) + END, INVALID, "invalid_value", "longer than 4096"),
    (part("filename=x") + END, INVALID, "invalid_value", "no name"),
    (part('name="reason"'), INVALID, "invalid_value", "ended before"),  # cut off between parts
    (f"--{BOUNDARY}\r\nContent-Disp", INVALID, "invalid_value", "ended before"),  # cut off in a header
    ("", INVALID, "invalid_value", "ended before"),
    ("{}", INVALID, "invalid_value", "not a well-formed"),  # another kind of body
    (f"--{BOUNDARY}\r\n" + "X: 1\r\n" * 1000, INVALID, "invalid_value", "not a well-formed"),  # headers without end
    (f"--{BOUNDARY}\r\nX: {'x' * 100_000}", INVALID, "invalid_value", "not a well-formed"),  # one without end
]


@pytest.mark.parametrize(
    ("form", "status", "code", "says"), FORMS, ids=[f"{code}-{number}" for number, (_, _, code, _) in enumerate(FORMS)]
)
@pytest.mark.parametrize("piece_bytes", [None, 1, 7])
async def test_forms_that_are_refused(
    client: httpx.AsyncClient,
    world: PluginWorld,
    monkeypatch: pytest.MonkeyPatch,
    form: str,
    status: int,
    code: str,
    says: str,
    piece_bytes: int | None,
) -> None:
    content, last, versions = form.encode(), last_event(world), world.registry.versions("chat")
    if piece_bytes is not None:  # however it is cut
        if len(content) > 10_000:
            piece_bytes *= 1000
        monkeypatch.setattr(uploads, "_WRITE_BYTES", piece_bytes)

    pieces = in_pieces(content, piece_bytes or len(content) or 1)
    response = await client.post(VERSIONS, content=pieces, headers=FORM)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code), error
    assert says in error["message"]
    assert error["message"].isprintable()
    assert not leftovers(world)
    assert world.registry.versions("chat") == versions
    assert refusals(world, last) == ([code] if status == REFUSED else [])


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        f"multipart/form-data; boundary={'x' * 71}",
    ],
)
async def test_what_is_no_form_is_refused(client: httpx.AsyncClient, world: PluginWorld, content_type: str) -> None:
    response = await client.post(VERSIONS, content=b"x", headers={"Content-Type": content_type})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "Content-Type")
    assert not leftovers(world)


@pytest.mark.parametrize("size", [1, 3, 1000])
async def test_a_form_may_come_in_pieces_of_any_size(
    client: httpx.AsyncClient, world: PluginWorld, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(uploads, "_WRITE_BYTES", size)
    whole = (await client.post(VERSIONS, content=body(world), headers=FORM)).json()
    pieces = await client.post(VERSIONS, content=in_pieces(body(world), size), headers=FORM)
    assert (pieces.status_code, pieces.json()["digest"]) == (201, whole["digest"])


async def test_an_upload_that_says_it_is_too_large_is_not_read(client: httpx.AsyncClient, world: PluginWorld) -> None:
    async def never() -> AsyncIterator[bytes]:
        raise AssertionError("nobody should have asked for the body")
        yield b""

    last = last_event(world)
    headers = {**FORM, "Content-Length": str((1 << 20) + 1)}
    response = await client.post(VERSIONS, content=never(), headers=headers)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "too_large")
    assert "larger than 1 MiB: raise store.max_upload_mib" in response.json()["error"]["message"]
    assert refusals(world, last) == ["too_large"]


@pytest.mark.parametrize("opening", [file_part(CONFIG, CONFIG), file_part("README.md", "x"), file_part("../x", "x")])
async def test_an_upload_that_does_not_say_so_is_cut_at_the_limit(
    client: httpx.AsyncClient, world: PluginWorld, opening: str
) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        yield opening.encode()[:-3]
        while True:
            sent += 1 << 16
            yield bytes(1 << 16)

    response = await client.post(VERSIONS, content=endless(), headers=FORM)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "too_large")
    assert sent == 1 << 20, "no further"
    assert not leftovers(world)


async def test_an_upload_that_stops_is_given_up(
    client: httpx.AsyncClient, world: PluginWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "IDLE_S", 0.05)
    forever = asyncio.Event()

    async def stalled() -> AsyncIterator[bytes]:
        yield body(world)[:100]
        await forever.wait()

    response = await client.post(VERSIONS, content=stalled(), headers=FORM)
    assert (response.status_code, response.json()["error"]["message"]) == (
        400,
        "nothing came for 0.05 s: send the upload again",
    )
    assert not leftovers(world)
