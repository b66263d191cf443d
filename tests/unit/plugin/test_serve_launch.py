from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from scion_adapters.cli.main import build_app
from scion_adapters.errors import InvalidInputError
from scion_adapters.keys import Scope, create_key
from scion_adapters.settings import Settings, load_settings
from tests.helpers.adapters import make_base
from tests.helpers.databases import sqlite_database
from vllm_scion.serve import Launch, as_shell, check_surroundings, plan_launch, warn_about_binding


def settings_in(folder: Path, text: str = "") -> Settings:
    (folder / "scion.toml").write_text(text)
    return load_settings(folder / "scion.toml")


def launch(settings: Settings, **changes: Any) -> Launch:
    values: dict[str, Any] = {
        "config_file": settings.home / "scion.toml",
        "environ": {},
        "cores": [0, 1, 2, 3],
        "is_cpu": True,
    }
    return plan_launch(settings, **{**values, **changes})


def value_of(arguments: tuple[str, ...], flag: str) -> str:
    return arguments[arguments.index(flag) + 1]


def test_a_local_nf4_base_on_cpu(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    planned = launch(settings_in(tmp_path, "[server]\nthreads = 2\nmax_model_len = 512\n"))
    assert planned.environment == {
        "VLLM_PLUGINS": "scion,bitsandbytes",
        "SCION_CONFIG": str(tmp_path / "scion.toml"),
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0,1",
        "OMP_NUM_THREADS": "2",
    }
    arguments = planned.arguments
    assert value_of(arguments, "--model") == str(tmp_path / "base")
    assert value_of(arguments, "--served-model-name") == "base"
    assert value_of(arguments, "--quantization") == "bitsandbytes"
    assert value_of(arguments, "--max-cpu-loras") == "12"
    assert value_of(arguments, "--max-model-len") == "512"
    assert value_of(arguments, "--gpu-memory-utilization") == "0.3"
    targets = arguments[arguments.index("--lora-target-modules") + 1 :][:7]
    assert targets == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def test_on_a_gpu_nothing_of_the_cpu_is_set(tmp_path: Path) -> None:
    planned = launch(settings_in(tmp_path, "[server]\nthreads = 2\n"), is_cpu=False)
    assert not {name for name in planned.environment if "CPU" in name or "OMP" in name}
    assert "--gpu-memory-utilization" not in planned.arguments


def test_a_hub_id_keeps_the_network_and_unquantized_bases_get_no_flag(tmp_path: Path) -> None:
    planned = launch(settings_in(tmp_path, '[base]\nmodel = "org/model"\nquantization = "none"\n'))
    assert "HF_HUB_OFFLINE" not in planned.environment
    assert "--quantization" not in planned.arguments
    assert value_of(planned.arguments, "--model") == "org/model"


@pytest.mark.parametrize(
    ("environ", "plugins", "unset"),
    [
        ({"VLLM_PLUGINS": "mine,scion"}, "mine,scion,bitsandbytes", ()),  # other plugins stay
        ({"VLLM_PLUGINS": ""}, "scion,bitsandbytes", ()),
        # vLLM's open loading endpoints never run beside ours
        ({"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}, "scion,bitsandbytes", ("VLLM_ALLOW_RUNTIME_LORA_UPDATING",)),
    ],
)
def test_the_users_environment_is_kept_where_it_does_no_harm(
    tmp_path: Path, environ: dict[str, str], plugins: str, unset: tuple[str, ...]
) -> None:
    planned = launch(settings_in(tmp_path), environ=environ)
    assert planned.environment["VLLM_PLUGINS"] == plugins
    assert planned.unset == unset


def test_extra_arguments_come_last_so_that_they_win(tmp_path: Path) -> None:
    planned = launch(settings_in(tmp_path, '[server]\nextra_args = ["--gpu-memory-utilization", "0.5"]\n'))
    assert planned.arguments[-2:] == ("--gpu-memory-utilization", "0.5")


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("[server]\nmax_loras = 9\nmax_cpu_loras = 8\n", "server.max_cpu_loras"),
        ("[server]\nthreads = 5\n", "server.threads"),  # more than this process may use
        ('[capture]\ncores = "9"\n', "capture.cores"),
        ('[capture]\ncores = "x"\n', "capture.cores"),
        ('[capture]\ncores = "0-3"\n', "capture.cores"),  # none is left
        ("[adapters.base]\n", "adapters.base"),  # nobody could ask for it
    ],
)
def test_contradictions_are_refused_by_name(tmp_path: Path, text: str, field: str) -> None:
    with pytest.raises(InvalidInputError) as refused:
        launch(settings_in(tmp_path, text))
    assert refused.value.field == field


def test_the_recorders_cores_are_not_vllms(tmp_path: Path) -> None:
    assert launch(settings_in(tmp_path)).cores == ()
    planned = launch(settings_in(tmp_path, '[capture]\ncores = "0"\n[server]\nthreads = 3\n'))
    assert planned.cores == (1, 2, 3)
    assert planned.environment["VLLM_CPU_OMP_THREADS_BIND"] == "1,2,3"
    assert as_shell(planned).splitlines()[-1].startswith("taskset -c 1,2,3 vllm serve ")


def test_print_shows_lines_for_a_shell() -> None:
    text = as_shell(Launch({"A": "x y"}, ("B",), ("--model", "/my base", "--enable-lora")))
    assert text == "unset B\nexport A='x y'\nvllm serve '/my base' --enable-lora"


@pytest.mark.parametrize(
    ("host", "arguments", "warns"),
    [
        ("127.0.0.1", (), False),
        ("localhost", (), False),
        ("::1", (), False),
        ("0.0.0.0", (), True),
        ("0.0.0.0", ("--api-key", "k"), False),
        ("10.0.0.5", ("--api-key=k",), False),
        ("gpu-host", (), True),  # a name may resolve to anything
    ],
)
def test_an_open_server_is_warned_about(
    host: str, arguments: tuple[str, ...], warns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    assert (warn_about_binding(host, arguments, False) is not None) == warns
    assert warn_about_binding(host, arguments, True) is None, "scion keys close it"


@pytest.mark.parametrize("own_key", ["--api-key=k", "VLLM_API_KEY", None])
def test_keys_of_vllm_and_ours_are_refused_before_the_engine_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_key: str | None
) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    make_base(tmp_path / "base")
    database = sqlite_database(tmp_path)
    settings = settings_in(tmp_path, f'[base]\nmodel = "base"\n[database]\nurl = "{database.url}"\n')
    arguments = [own_key] if own_key and own_key.startswith("-") else []
    if own_key == "VLLM_API_KEY":
        monkeypatch.setenv(own_key, "k")
    assert check_surroundings(settings, arguments) is False
    create_key(database, "shop", Scope.CHAT, actor="me")
    database.dispose()
    if own_key is None:
        assert check_surroundings(settings, arguments) is True
        return
    with pytest.raises(InvalidInputError, match="drop vLLM's"):
        check_surroundings(settings, arguments)


def test_the_command_prints_without_starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings_in(tmp_path, "[server]\nport = 8123\n")
    monkeypatch.setenv("SCION_CONFIG", str(tmp_path / "scion.toml"))
    result = CliRunner().invoke(build_app(), ["serve", "--print", "--port", "9000", "--enforce-eager"])
    assert result.exit_code == 0, result.output
    last = result.output.strip().splitlines()[-1]
    assert last.startswith("vllm serve base")
    assert "--port 9000" in last
    assert last.endswith("--enforce-eager")
