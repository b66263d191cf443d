"""What serving benchmarks need: one adapter, as PEFT files and as the champion of a registry, and server processes.

Knows how to start and stop a server and when it answers, not what is measured on it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scion_adapters.aliases import set_alias_in
from scion_adapters.clock import now
from scion_adapters.fingerprint import base_info
from scion_adapters.records import CHAMPION
from scion_adapters.registry import open_registry
from scion_adapters.settings import load_settings
from tests.helpers.adapters import LIMITS, make_adapter

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "deploy" / "demo" / "scion_demo" / "base"
RANK = 16
OFFLINE = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "DO_NOT_TRACK": "1"}
_NOT_INHERITED = ("VLLM_PLUGINS", "PROMETHEUS_MULTIPROC_DIR")


@dataclass(frozen=True, slots=True)
class World:
    """A configured home with `chat:1` as champion, and the same adapter as a plain directory for stock vLLM."""

    home: Path
    config: Path
    adapter: Path
    base: Path


def make_world(home: Path, base: Path = BASE, settings: Mapping[str, Mapping[str, Any]] | None = None) -> World:
    """Write scion.toml and publish one random adapter as the champion of `chat`. `settings` are further sections."""
    home.mkdir(parents=True)
    config = home / "scion.toml"
    sections: dict[str, Mapping[str, Any]] = {"base": {"model": str(base), "served_name": "base"}, **(settings or {})}
    lines = [
        f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items())
        for name, values in sections.items()
    ]
    config.write_text("\n".join([*lines, "[adapters.chat]\n"]), encoding="utf-8")
    loaded = load_settings(config)
    adapter = make_adapter(home / "peft", base, rank=RANK, alpha=2 * RANK, seed=1)
    registry = open_registry(loaded)
    registry.ensure_adapter("chat")
    version = registry.publish("chat", adapter, parent=0, base=base_info(loaded), limits=LIMITS, actor="bench")
    registry.accept(version.ref, actor="bench", reason="a random adapter to measure with")
    with registry.database.write() as connection:
        set_alias_in(connection, "chat", CHAMPION, version.number, clock_value=now(), actor="bench")
    registry.database.dispose()
    return World(home, config, adapter, base)


@dataclass(frozen=True, slots=True)
class Spec:
    """A server to run: arguments of this Python, where it answers, and what answers 200 once it is ready."""

    name: str
    command: Sequence[str]
    port: int
    environment: Mapping[str, str]
    cores: Sequence[int] = ()
    ready_path: str = "/health"


@dataclass(frozen=True, slots=True)
class Server:
    """A server process that answers at `url`; what it prints is in `log`."""

    name: str
    port: int
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def is_running(self) -> bool:
        return self.process.poll() is None

    def tail(self) -> str:
        text = self.log.read_text(encoding="utf-8", errors="replace")
        return "\n".join([line for line in text.splitlines() if "] Route: " not in line][-40:])


@contextlib.contextmanager
def running(specs: Sequence[Spec], home: Path, timeout_s: float = 240.0) -> Iterator[dict[str, Server]]:
    """Run the servers, by name, until the block ends; enters once all are ready. Their logs are HOME/NAME.log."""
    servers: dict[str, Server] = {}
    try:
        for spec in specs:
            servers[spec.name] = _start(spec, home)
        for spec in specs:
            _wait(servers[spec.name], spec.ready_path, timeout_s)
        yield servers
    finally:
        for server in servers.values():
            _stop(server.process)


def _start(spec: Spec, home: Path) -> Server:
    log = home / f"{spec.name}.log"
    inherited = {key: value for key, value in os.environ.items() if key not in _NOT_INHERITED}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *spec.command],
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**inherited, **OFFLINE, **spec.environment},
            start_new_session=True,  # its engine process ends with it
        )
    if spec.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(process.pid, spec.cores)
    return Server(spec.name, spec.port, process, log)


def get_json(url: str, timeout_s: float = 10.0) -> Any:
    """The JSON that `url` answers with; raises OSError when it does not answer 200."""
    with urllib.request.urlopen(url, timeout=timeout_s) as response:
        return json.load(response)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def _wait(server: Server, path: str, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        if not server.is_running():
            raise RuntimeError(f"{server.name} ended with status {server.process.returncode}:\n{server.tail()}")
        try:
            urllib.request.urlopen(server.url + path, timeout=2).close()
            return
        except urllib.error.HTTPError as error:
            if error.code == 404:  # it is up, without the plugin
                raise RuntimeError(f"{server.name} has no {path}:\n{server.tail()}") from error
        except OSError:
            pass  # not up yet
        if time.monotonic() > deadline:
            raise TimeoutError(f"{server.name} did not answer within {timeout_s:g} s:\n{server.tail()}")
        time.sleep(0.1)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, then SIGKILL for the whole process group of a server that does not end."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=10)
