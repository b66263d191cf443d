"""The stage of the demo: its folder, its configuration, the server process, and `scion` commands run as a person would.

Owns processes and files. It knows nothing of what the demo plays. Everything it starts runs in a process group of its
own and is ended with it.
"""

import asyncio
import json
import os
import shutil
import signal
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import httpx

from scion_demo.errors import DemoError

MARKER = ".scion-demo"
"""A file that says that a folder is the demo's own and may be emptied."""
BASE_NAME = "demo-base"
START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 30.0

CONFIG = """\
# Written by `scion demo`: small numbers, so that minutes are enough. `scion init` writes the full, commented file.
[base]
model = {base}
served_name = "{base_name}"

[server]
port = {port}
threads = {server_threads}
max_model_len = 512

[rollout]
poll_interval_s = 0.1
heartbeat_s = 1.0

[trainer]
server_url = "http://127.0.0.1:{port}"
threads = {trainer_threads}
{cores}
max_length = 256
seed = {seed}

[trainer.sft]
# The demo's base has two million parameters; adapters that small want a far higher rate than a large model's.
learning_rate = 1e-3
epochs = 4.0

[gates]
retention_file = {retention}
approve_first = 0  # nobody is there to approve
# Wide: the raid's version forgets what users liked and may lose some facts, and the gates would stop it for either. The
# demo shows that users' votes stop it, too.
retention_max_missed = 0.3
forgetting_max_drop = 100.0

[adapters.chat]
"""


class CommandError(DemoError):
    """A `scion` command ended otherwise than expected."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command ended with: `code` 0 is success; `output` is the JSON it printed, None if it printed none."""

    code: int
    output: Any
    errors: str


@dataclass(slots=True)
class Stage:
    """A folder with a configuration, and the server that runs from it."""

    folder: Path
    port: int
    server: asyncio.subprocess.Process | None = None
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start_server(self) -> None:
        """Start `scion serve` and wait until it answers. Raises DemoError with the end of its log."""
        log = (self.folder / "server.log").open("wb")
        self.server = await asyncio.create_subprocess_exec(
            *_scion(self.folder, "serve"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            env=self.environment,
        )
        log.close()
        async with httpx.AsyncClient() as http:
            deadline = asyncio.get_running_loop().time() + START_TIMEOUT_S
            while asyncio.get_running_loop().time() < deadline:
                if self.server.returncode is not None:
                    raise DemoError(
                        f"the server ended with code {self.server.returncode}; its log ends:\n{self._log_end()}"
                    )
                try:
                    if (await http.get(f"{self.base_url}/health", timeout=2.0)).status_code == httpx.codes.OK:
                        return
                except httpx.TransportError:
                    pass
                await asyncio.sleep(0.2)
        raise DemoError(f"the server did not answer within {START_TIMEOUT_S:.0f} s; its log ends:\n{self._log_end()}")

    async def stop_server(self) -> None:
        """End the server and all its children."""
        if self.server is None:
            return
        for number, patience in ((signal.SIGTERM, STOP_TIMEOUT_S), (signal.SIGKILL, 10.0)):
            try:
                os.killpg(self.server.pid, number)
            except ProcessLookupError:
                break
            try:
                await asyncio.wait_for(self.server.wait(), patience)
            except TimeoutError:
                continue
        self.server = None

    async def serve_until_interrupted(self) -> None:
        """Wait until the server ends by itself or the caller is cancelled, as Ctrl-C does."""
        if self.server is not None:
            await self.server.wait()

    async def run(self, *arguments: str, show: bool = False) -> Outcome:
        """Run `scion ARGUMENTS --json`; its progress goes to the terminal if `show`, and to commands.log either way."""
        process = await asyncio.create_subprocess_exec(
            *_scion(self.folder, *arguments, "--json"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
            env=self.environment,
        )
        try:
            output, errors = await asyncio.gather(_read_all(process.stdout), _read_all(process.stderr, echo=show))
            code = await process.wait()
        except asyncio.CancelledError:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGTERM)
                await process.wait()
            raise
        with (self.folder / "commands.log").open("a", encoding="utf-8") as log:
            log.write(f"$ scion {' '.join(arguments)}\n{output}{errors}exit code {code}\n\n")
        try:
            parsed = json.loads(output) if output.strip() else None
        except ValueError:
            parsed = None
        return Outcome(code=code, output=parsed, errors=errors)

    async def must(self, *arguments: str, show: bool = False) -> Any:
        """`run`, for a command that has to succeed. Raises CommandError with what it said."""
        outcome = await self.run(*arguments, show=show)
        if outcome.code != 0:
            raise CommandError(
                f"`scion {' '.join(arguments)}` ended with code {outcome.code}: {outcome.errors.strip()[-2000:]}\n"
                f"the whole output is in {self.folder / 'commands.log'}, the server's in {self.folder / 'server.log'}"
            )
        return outcome.output

    def _log_end(self, num_lines: int = 30) -> str:
        lines = (self.folder / "server.log").read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-num_lines:])


def set_stage(folder: Path, *, seed: int, port: int | None = None) -> Stage:
    """Make an empty demo folder with its configuration.

    Raises DemoError if the folder holds anything that no demo put there.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / MARKER).exists():
        raise DemoError(f"{folder} is not empty and not an earlier demo's: name another folder with --dir")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / MARKER).touch()
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    # vLLM takes the first cores; the trainer gets the others, because both on one core slow each other down many times.
    num_server = max(1, len(cores) // 2)
    trainer_cores = cores[num_server:]
    stage = Stage(folder=folder.resolve(), port=port or free_port())
    base = resources.files("scion_demo") / "base"
    (stage.folder / "scion.toml").write_text(
        CONFIG.format(
            base=json.dumps(str(base)),
            base_name=BASE_NAME,
            port=stage.port,
            server_threads=num_server,
            trainer_threads=max(1, len(trainer_cores)),
            cores=f'cores = "{",".join(map(str, trainer_cores))}"' if trainer_cores else "",
            seed=seed,
            retention=json.dumps(str(resources.files("scion_demo") / "retention.jsonl")),
        ),
        encoding="utf-8",
    )
    stage.environment |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "SCION_ACTOR": "demo"}
    return stage


def free_port() -> int:
    """A TCP port of the loopback interface that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _scion(folder: Path, *arguments: str) -> Sequence[str]:
    return (sys.executable, "-m", "scion_adapters.cli.main", "--config", str(folder / "scion.toml"), *arguments)


async def _read_all(stream: asyncio.StreamReader | None, *, echo: bool = False) -> str:
    pieces: list[bytes] = []
    while stream is not None and (piece := await stream.read(4096)):
        pieces.append(piece)
        if echo:
            sys.stderr.buffer.write(piece)
            sys.stderr.flush()
    return b"".join(pieces).decode(errors="replace")
