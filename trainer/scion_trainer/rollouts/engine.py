"""Rollouts from an engine of the run's own: `scion serve` as a child process, with a registry that dies with it.

The child is a whole server of ours in a scratch home (database, store, port of its own), so that a step's adapter goes
the one way that every adapter goes: checked, under a fresh name and id, removed from the engine afterwards. Owns the
scratch configuration and the process; what is asked of it stands in server.py. vLLM is never imported here.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import httpx

from scion_adapters.errors import UnavailableError
from scion_adapters.fingerprint import BaseInfo
from scion_adapters.registry import Registry, open_registry
from scion_adapters.replicas import ReplicaLedger, heartbeat_ttl_s
from scion_adapters.settings import CONFIG_ENV, Settings, load_settings
from scion_trainer.rollouts.sampling import Sampling
from scion_trainer.rollouts.server import ServerSource
from scion_trainer.rollouts.types import Rollout

CONCURRENCY = 64
"""Answers sampled at once: vLLM's batches are worth their start from about so many on, and nobody waits beside them."""
START_TIMEOUT_S = 600.0
MAX_RESTARTS = 2
"""In a row: an engine that dies at every batch is not started for ever."""
_TAIL_CHARS = 1500
_GPU_MEMORY_SHARE = "0.3"
"""Of a GPU that the run trains on, too: it needs room for one more copy of the quantized base and a batch's cache."""
_NOT_INHERITED = (
    "SCION_",
    "OMP_",
    "MKL_",
    "KMP_",
    "MALLOC_MMAP_THRESHOLD_",
    "VLLM_PLUGINS",
    "PROMETHEUS_MULTIPROC_DIR",
)
"""Beginnings of names: the operator's overrides are for the live configuration, threads and memory are the run's."""

T = TypeVar("T")


class EngineProcess:
    """The child: started, asked whether it lives, ended. `command` replaces `scion serve` in tests."""

    def __init__(
        self,
        home: Path,
        url: str,
        environment: Mapping[str, str],
        *,
        command: Sequence[str] | None = None,
        timeout_s: float = START_TIMEOUT_S,
        monotonic: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.log = home.with_suffix(".log")  # beside the home: it is read when that is gone
        self._home = home
        self._url = url
        self._environment = environment
        self._command = tuple(command or (sys.executable, "-m", "scion_adapters.cli.main", "serve"))
        self._timeout_s = timeout_s
        self._monotonic = monotonic
        self._sleep = sleep
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def is_healthy(self) -> bool:
        """Whether it answers. A server whose engine died lives a little longer, and says so."""
        try:
            return self.is_running and httpx.get(f"{self._url}/health", trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    def start(self) -> float:
        """Start it and wait until it answers; returns the seconds. Raises UnavailableError with the log's end."""
        self.stop()
        began = self._monotonic()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "scion_trainer.rollouts.guard", *self._command],
                stdin=subprocess.PIPE,  # closed by the kernel when this process ends: the guard then ends the engine
                stdout=log,
                stderr=log,
                cwd=self._home,
                env=dict(self._environment),
                start_new_session=True,
            )
        try:
            self._wait(began + self._timeout_s)
        except BaseException:
            self.stop()
            raise
        return self._monotonic() - began

    def stop(self) -> None:
        """End it; nothing happens when it is not running."""
        if (process := self._process) is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(timeout=30.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._process = None

    def tail(self) -> str:
        """The end of its log, for messages."""
        try:
            return self.log.read_text(encoding="utf-8", errors="replace")[-_TAIL_CHARS:].strip()
        except OSError:
            return ""

    def _wait(self, deadline: float) -> None:
        assert self._process is not None
        with httpx.Client(timeout=2.0, trust_env=False) as client:
            while self._monotonic() < deadline:
                if (status := self._process.poll()) is not None:
                    raise UnavailableError(
                        f"the engine for rollouts ended with status {status} before it served; its log {self.log} "
                        f"ends: {self.tail()}"
                    )
                try:
                    if client.get(f"{self._url}/health").status_code == 200:
                        return
                except httpx.TransportError:
                    pass
                self._sleep(0.1)
        raise UnavailableError(
            f"the engine for rollouts did not serve within {self._timeout_s:g} s; its log {self.log} ends: "
            f"{self.tail()}"
        )


class EngineSource:
    """`RolloutSource` over an engine of its own below `home`, which is emptied first.

    It starts with the first `update`. One that dies is started again, with the present adapter, and asked again.
    """

    def __init__(
        self,
        settings: Settings,
        base: BaseInfo,
        sampling: Sampling,
        home: Path,
        *,
        actor: str,
        max_length: int,
        say: Callable[[str], None] = lambda _: None,
        command: Sequence[str] | None = None,
    ) -> None:
        """`max_length`: the longest prompt and answer together, in tokens. `command` replaces `scion serve`."""
        self._home = home
        self._base = base
        self._sampling = sampling
        self._actor = actor
        self._say = say
        self._command = command
        self._sections = scratch_sections(settings, max_length=max_length, num_cores=_num_cores(), port=_free_port())
        self._scratch = settings
        self._process: EngineProcess | None = None
        self._registry: Registry | None = None
        self._source: ServerSource | None = None

    @property
    def url(self) -> str:
        """Where the engine's server answers, once it was started."""
        return self._scratch.trainer.server_url

    def update(self, adapter_directory: Path, step: int) -> None:
        self._keep_asking(lambda source: source.update(adapter_directory, step))

    def sample(self, prompts: Sequence[Sequence[int]], *, seed: int) -> list[Rollout]:
        return self._keep_asking(lambda source: source.sample(prompts, seed=seed))

    def close(self) -> None:
        """End the engine and delete its home. Its registry goes with it: there is nothing to take back."""
        if self._process is not None:
            self._process.stop()
            self._process = None
        if self._registry is not None:
            if self._source is not None:
                self._source.abandon()
            self._registry.database.dispose()
            self._registry = self._source = None
        shutil.rmtree(self._home, ignore_errors=True)

    def _keep_asking(self, ask: Callable[[ServerSource], T]) -> T:
        restarts = 0
        while True:
            source = self._running()
            try:
                return ask(source)
            except UnavailableError as error:
                assert self._process is not None
                if self._process.is_healthy() or restarts == MAX_RESTARTS:
                    raise
                self._process.stop()
                restarts += 1
                self._say(f"the engine for rollouts died ({restarts} of {MAX_RESTARTS} times allowed): {error}")

    def _running(self) -> ServerSource:
        """The source over a living engine, which is started when there is none."""
        if self._source is None or self._registry is None or self._process is None:
            return self._begin()
        if not self._process.is_running:  # found here, too, when it died between two questions
            self._say("starting the engine for rollouts again")
            ledger = ReplicaLedger(self._registry.database)
            for dead in ledger.live(heartbeat_ttl_s(self._scratch)):  # nobody must wait for it to load anything
                ledger.remove(dead.id)
            self._process.start()
            self._source.wait_loaded()
        return self._source

    def _begin(self) -> ServerSource:
        self.close()
        self._home.mkdir(parents=True)
        file = self._home / "scion.toml"
        file.write_text(_to_toml(self._sections), encoding="utf-8")
        # The environment overrides files: what stands in the file is given again, above it.
        self._scratch = load_settings(file, overrides=self._sections)
        self._registry = open_registry(self._scratch)
        self._source = ServerSource(
            self._scratch, self._registry, self._base, self._sampling, actor=self._actor, concurrency=CONCURRENCY
        )
        environment = child_environment(os.environ, file)
        self._process = EngineProcess(self._home, self._scratch.trainer.server_url, environment, command=self._command)
        seconds = self._process.start()
        self._say(f"an engine for rollouts started in {seconds:.0f} s")
        return self._source


def scratch_sections(settings: Settings, *, max_length: int, num_cores: int, port: int) -> dict[str, dict[str, Any]]:
    """The configuration of the engine's server: the run's base and limits, and nothing else of the live one."""
    base, server = settings.base, settings.server
    longest = _longest_of(settings)
    return {
        "base": {
            "model": str(settings.base_path.resolve() if settings.base_path else base.model),
            "served_name": "base",
            "quantization": base.quantization,
        },
        "database": {"url": "sqlite:///scion.db"},
        "store": {"url": "artifacts", "cache": "cache"},
        "server": {
            "host": "127.0.0.1",
            "port": port,
            "max_loras": 2,  # the step that is sampled and the next one
            "max_cpu_loras": 4,
            "max_lora_rank": server.max_lora_rank,
            "target_modules": list(server.target_modules),
            "max_model_len": min(max_length, longest) if longest else max_length,
            "threads": max(1, num_cores - 1),  # one for its HTTP process; it works while the trainer waits
            "api_server_count": 1,
            "data_parallel_size": 1,
            "kv_cache_gib": server.kv_cache_gib,
            "ppo_rollouts": True,
            "extra_args": ["--gpu-memory-utilization", _GPU_MEMORY_SHARE],
        },
        "capture": {"enabled": False, "journal": "journal"},
        "privacy": {"hash_key_file": "user_hash.key"},
        "trainer": {"server_url": f"http://127.0.0.1:{port}"},
    }


def child_environment(environ: Mapping[str, str], config_file: Path) -> dict[str, str]:
    """What the engine's server inherits of the run's environment, and its own configuration."""
    kept = {name: value for name, value in environ.items() if not name.startswith(_NOT_INHERITED)}
    return {**kept, CONFIG_ENV: str(config_file), "VLLM_NO_USAGE_STATS": "1"}


def _longest_of(settings: Settings) -> int | None:
    """The positions that a local base has, None when it does not say."""
    if settings.base_path is None:
        return None
    try:
        config = json.loads((settings.base_path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found = config.get("max_position_embeddings")
    return found if isinstance(found, int) else None


def _num_cores() -> int:
    """The cores that this process, and so its child, may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _to_toml(sections: Mapping[str, Mapping[str, Any]]) -> str:
    """JSON's strings, numbers, booleans and lists are TOML's, too."""
    lines: list[str] = []
    for name, values in sections.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    return "\n".join([*lines, ""])
