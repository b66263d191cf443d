"""The engine's process: it is waited for, its log is quoted, and it ends with the run, however the run ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from scion_adapters.errors import UnavailableError
from scion_adapters.settings import load_settings
from scion_trainer.rollouts.engine import EngineProcess, child_environment, scratch_sections
from tests.helpers.serving import free_port
from tests.helpers.waiting import wait_for

SERVER = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_):
        pass
print(child.pid, flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""
"""A server with an engine process of its own, as vLLM has."""

RUN = """
import sys, time
from pathlib import Path
from scion_trainer.rollouts.engine import EngineProcess
home, port = Path(sys.argv[1]), sys.argv[2]
server = (home / "server.py").read_text()
engine = EngineProcess(home, f"http://127.0.0.1:{port}", dict(PATH=""), command=[sys.executable, "-c", server, port])
engine.start()
print("up", flush=True)
time.sleep(600)
"""


def process_of(home: Path, code: str = SERVER) -> EngineProcess:
    port = str(free_port())
    command = [sys.executable, "-c", code, port]
    return EngineProcess(home, f"http://127.0.0.1:{port}", dict(os.environ), command=command, timeout_s=20.0)


def engine_pid(process: EngineProcess) -> int:
    return int(process.log.read_text().split()[0])


def test_it_serves_when_start_returns_and_nothing_is_left_after_stop(tmp_path: Path) -> None:
    process = process_of(tmp_path)
    assert not process.is_running
    process.start()
    assert process.is_running
    pid = engine_pid(process)
    process.stop()
    assert not process.is_running
    wait_for(lambda: not psutil.pid_exists(pid), "the end of the engine's own process")
    process.stop()


def test_an_engine_that_cannot_start_says_why(tmp_path: Path) -> None:
    process = process_of(tmp_path, "import sys; sys.exit('no such model')")
    with pytest.raises(UnavailableError, match="no such model"):
        process.start()


def test_an_engine_that_dies_is_noticed(tmp_path: Path) -> None:
    process = process_of(tmp_path)
    process.start()
    server = psutil.Process(engine_pid(process)).parent()
    assert server is not None
    server.kill()
    wait_for(lambda: not process.is_running, "that the end is noticed")
    process.start()
    assert process.is_running
    process.stop()


def test_a_run_that_is_killed_takes_its_engine_along(tmp_path: Path) -> None:
    (tmp_path / "server.py").write_text(SERVER)
    run = subprocess.Popen(
        [sys.executable, "-c", RUN, str(tmp_path), str(free_port())],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert run.stdout is not None
    assert run.stdout.readline() == "up\n"
    pid = int(tmp_path.with_suffix(".log").read_text().split()[0])
    run.send_signal(signal.SIGKILL)
    run.wait()
    run.stdout.close()
    wait_for(lambda: not psutil.pid_exists(pid), "the end of the killed run's engine")


def test_the_engine_has_nothing_of_the_live_configuration(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text('{"max_position_embeddings": 300}')
    (tmp_path / "scion.toml").write_text(
        '[base]\nmodel = "base"\n[database]\nurl = "postgresql+psycopg://live/db"\n[server]\nmax_lora_rank = 32\n'
    )
    settings = load_settings(tmp_path / "scion.toml")
    sections = scratch_sections(settings, max_length=512, num_cores=4, port=1234)
    assert sections["database"]["url"] == "sqlite:///scion.db"
    assert sections["base"]["model"] == str(tmp_path / "base")
    assert sections["server"]["max_lora_rank"] == 32
    assert sections["server"]["max_model_len"] == 300, "no more than the base has positions"
    assert sections["server"]["threads"] == 3
    assert sections["capture"]["enabled"] is False
    environ = {"PATH": "/bin", "SCION_DATABASE__URL": "live", "OMP_NUM_THREADS": "1", "VLLM_PLUGINS": "x", "HOME": "/h"}
    assert child_environment(environ, tmp_path / "e.toml") == {
        "PATH": "/bin",
        "HOME": "/h",
        "SCION_CONFIG": str(tmp_path / "e.toml"),
        "VLLM_NO_USAGE_STATS": "1",
    }


def test_the_operator_s_environment_cannot_turn_the_engine_to_the_live_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCION_DATABASE__URL", "postgresql+psycopg://live/db")
    monkeypatch.setenv("SCION_STORE__URL", "s3://live")
    file = tmp_path / "scion.toml"
    file.write_text("")
    sections = scratch_sections(load_settings(file), max_length=64, num_cores=1, port=1)
    scratch = load_settings(file, overrides=sections)
    assert scratch.database_url == f"sqlite:///{tmp_path / 'scion.db'}"
    assert scratch.store.url == "artifacts"
