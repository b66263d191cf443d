"""A real server for tests and benchmarks: `scion serve` as a child process, in a folder of its own, on a free port.

    with Server.make(tmp_path, base=DEMO_BASE, adapters=("chat",)) as server:
        httpx.post(f"{server.url}/v1/chat/completions", …)

The folder holds scion.toml, the database, the artifact store and server.log; `server.settings` opens them from outside.
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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from scion_adapters.settings import Settings, load_settings

REPOSITORY = Path(__file__).resolve().parents[2]
DEMO_BASE = REPOSITORY / "deploy" / "demo" / "scion_demo" / "base"
START_TIMEOUT_S = 300.0


@dataclass
class Server:
    """`scion serve` in `home`. `start`, `stop` and `kill` may be called again and again on the same folder."""

    home: Path
    port: int
    environment: Mapping[str, str] = field(default_factory=dict)
    arguments: Sequence[str] = ()
    cores: Sequence[int] = ()
    process: subprocess.Popen[bytes] | None = None

    @classmethod
    def make(
        cls,
        home: Path,
        *,
        base: Path = DEMO_BASE,
        adapters: Sequence[str] = ("chat",),
        threads: int | None = None,
        config: Mapping[str, Mapping[str, Any]] | None = None,
        environment: Mapping[str, str] | None = None,
        arguments: Sequence[str] = (),
        port: int | None = None,
        cores: Sequence[int] = (),
    ) -> Server:
        """Write scion.toml into `home`, without starting anything. `config` is merged in, section by section.

        `threads` for vLLM's worker default to all cores but one, which is left to the clients. `cores`: the only ones
        that it may use; two servers need cores of their own, or their workers wait for each other at every step.
        """
        home.mkdir(parents=True, exist_ok=True)
        port = port or free_port()
        sections: dict[str, dict[str, Any]] = {
            "base": {"model": str(base)},
            "server": {"port": port, "threads": threads or max(1, len(os.sched_getaffinity(0)) - 1)},
            "trainer": {"server_url": f"http://127.0.0.1:{port}"},
        }
        for name, values in (config or {}).items():
            sections.setdefault(name, {}).update(values)
        (home / "scion.toml").write_text(to_toml(sections, adapters))
        return cls(home, port, dict(environment or {}), tuple(arguments), tuple(cores))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        return self.home / "server.log"

    @property
    def settings(self) -> Settings:
        """The configuration that the server reads."""
        return load_settings(self.home / "scion.toml")

    def __enter__(self) -> Server:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> float:
        """Start and wait until /health answers; returns the seconds. Raises RuntimeError with the log's end."""
        assert self.process is None, "already started"
        environment = {**os.environ, "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", **self.environment}
        environment["SCION_CONFIG"] = str(self.home / "scion.toml")
        command = [sys.executable, "-m", "scion_adapters.cli.main", "serve", *self.arguments]
        started = time.monotonic()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=self.home, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        if self.cores:
            os.sched_setaffinity(self.process.pid, self.cores)
        try:
            self._wait_until_healthy(started + START_TIMEOUT_S)
        except BaseException:
            self.kill()
            raise
        return time.monotonic() - started

    def stop(self, timeout_s: float = 30.0) -> None:
        """End it in good order (SIGTERM), and whatever is left of it by force."""
        if self.process is None:
            return
        self.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout_s)
        self.kill()

    def kill(self) -> None:
        """kill -9 of the server process, then of its engine; returns when all are gone."""
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process = None

    def log_tail(self, num_chars: int = 4000) -> str:
        return self.log.read_text(errors="replace")[-num_chars:] if self.log.exists() else ""

    def _wait_until_healthy(self, deadline: float) -> None:
        assert self.process is not None
        with httpx.Client(timeout=2.0) as client:
            while time.monotonic() < deadline:
                if (code := self.process.poll()) is not None:
                    raise RuntimeError(f"the server ended with exit status {code}:\n{self.log_tail()}")
                try:
                    if client.get(f"{self.url}/health").status_code == 200:
                        return
                except httpx.TransportError:
                    pass
                time.sleep(0.2)
        raise RuntimeError(f"no /health within {START_TIMEOUT_S:g} s:\n{self.log_tail()}")


def halves() -> tuple[list[int], list[int]]:
    """The cores of this process in two parts; the same one twice if there is only one."""
    cores = sorted(os.sched_getaffinity(0))
    middle = len(cores) // 2
    return (cores[:middle], cores[middle:]) if middle else (cores, cores)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def to_toml(sections: Mapping[str, Mapping[str, Any]], adapters: Sequence[str]) -> str:
    """scion.toml's text. JSON's strings, numbers, booleans and lists are TOML's too."""
    lines: list[str] = []
    for name, values in sections.items():
        lines.append(f"[{name}]")
        lines += [f"{key} = {json.dumps(value)}" for key, value in values.items()]
    lines += [f"[adapters.{json.dumps(name)}]" for name in adapters]
    return "\n".join(lines) + "\n"
