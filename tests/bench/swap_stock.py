"""The same traffic on stock vLLM, with runtime LoRA updating on and its own load and unload endpoints doing the swaps.

Two ways in which its documentation lets one serve a new version under a fixed name: `load_inplace` under the same name,
and unloading the name, then loading it from another path. Each once with all files kept, and once with those of
versions that nobody is served any more deleted, as `gc` does in ours.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx

from scion_adapters.settings import load_settings
from tests.bench.markers import Marker
from tests.bench.storm import Answer
from tests.bench.storm_clients import Clients
from tests.bench.world import Server, Spec, free_port, running
from tests.helpers.serving import Server as Configured
from vllm_scion.serve import available_cores, is_cpu_build, plan_launch

NUM_CLIENTS = 12
WAYS = ("stock in place", "stock unload+load", "stock in place, deleting", "stock unload+load, deleting")
PAUSE_S = 0.15
"""Between two swaps; ours take longer, as a version is published, checked and loaded in each."""


@dataclass(frozen=True, slots=True)
class Way:
    """What one way of swapping gave. `mixed`: words of several versions in one answer."""

    name: str
    num_swaps: int
    num_answers: int
    failed: int
    mixed: int
    stale: int
    died: bool

    def row(self) -> tuple[str, ...]:
        unknown = "-"
        return (
            self.name, str(self.num_swaps), str(self.num_answers), str(self.failed), str(self.mixed), unknown,
            str(self.stale), unknown, unknown, "yes" if self.died else "no",
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class StockStorm:
    ways: tuple[Way, ...]

    def rows(self) -> list[tuple[str, ...]]:
        return [way.row() for way in self.ways]

    def to_json(self) -> list[dict[str, Any]]:
        return [{name: getattr(way, name) for name in Way.__slots__} for way in self.ways]


def measure(home: Path, templates: list[Marker], num_swaps: int) -> StockStorm:
    """Each way on a server of its own."""
    ways = []
    for name in WAYS:
        directory = home / name.replace(" ", "-")
        configured = Configured.make(directory, threads=1)
        launch = plan_launch(
            load_settings(configured.home / "scion.toml"),
            config_file=None,
            environ={},
            cores=available_cores(),
            is_cpu=is_cpu_build(),
        )
        port = free_port()
        arguments = list(launch.arguments)
        arguments[arguments.index("--port") + 1] = str(port)
        environment = {
            **launch.environment,
            "VLLM_PLUGINS": "bitsandbytes",
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
        }
        spec = Spec("stock", ["-m", "vllm.entrypoints.openai.api_server", *arguments], port, environment)
        with running([spec], directory) as servers:
            ways.append(asyncio.run(_storm(name, servers["stock"], directory, templates, num_swaps)))
    return StockStorm(tuple(ways))


async def _storm(name: str, server: Server, home: Path, templates: list[Marker], num_swaps: int) -> Way:
    clients = Clients([server.url], NUM_CLIENTS)
    in_place, deletes = "in place" in name, "deleting" in name
    loaded_at: list[tuple[float, str]] = []
    async with httpx.AsyncClient(base_url=server.url, timeout=30.0) as http:
        current = await _load(http, home, templates[0], 0, load_inplace=False)
        loaded_at.append((time.monotonic(), templates[0].word))
        done = 0
        async with clients:
            for number, marker in zip(range(1, num_swaps + 1), cycle(templates[1:] + templates[:1]), strict=False):
                await asyncio.sleep(PAUSE_S)
                try:
                    if not in_place:
                        await http.post("/v1/unload_lora_adapter", json={"lora_name": "chat"})
                    previous, current = current, await _load(http, home, marker, number, load_inplace=in_place)
                except httpx.HTTPError:
                    break
                loaded_at.append((time.monotonic(), marker.word))
                if deletes:
                    shutil.rmtree(previous)
                done = number
                if not server.is_running():
                    break
        died = not server.is_running() or not await _is_healthy(http)
    return Way(
        name=name,
        num_swaps=done,
        num_answers=len(clients.answers),
        failed=sum(answer.status != 200 or bool(answer.error) for answer in clients.answers),
        mixed=sum(len(answer.words) > 1 for answer in clients.answers),
        stale=sum(_is_stale(answer, loaded_at) for answer in clients.answers),
        died=died,
    )


def _is_stale(answer: Answer, loaded_at: list[tuple[float, str]]) -> bool:
    """Whether a pure answer came from a version that had been replaced a second before the request began."""
    current = [word for at, word in loaded_at if at <= answer.started - 1.0]
    possible = set(current[-1:]) | {word for at, word in loaded_at if answer.started - 1.0 < at <= answer.ended}
    return len(answer.words) == 1 and not answer.words <= possible


async def _load(http: httpx.AsyncClient, home: Path, marker: Marker, number: int, *, load_inplace: bool) -> Path:
    path = home / "loras" / f"{number}"
    shutil.copytree(marker.directory, path)
    body = {"lora_name": "chat", "lora_path": os.fspath(path), "load_inplace": load_inplace}
    await http.post("/v1/load_lora_adapter", json=body)
    return path


async def _is_healthy(http: httpx.AsyncClient) -> bool:
    try:
        return (await http.get("/health")).status_code == 200
    except httpx.HTTPError:
        return False
