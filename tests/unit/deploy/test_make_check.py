"""`make check` leaves out no unit test, shows each job's output in one piece, and fails when any of its jobs fails."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
JOB = """\
#!/bin/sh
echo "begin $0 $*" >> {log}
case "$*" in {failing}) echo "1 of $*"; echo "2 of $*"; exit 1;; esac
"""

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def make_check(home: Path, *options: str, failing: str = "nothing") -> tuple[subprocess.CompletedProcess[str], str]:
    """Run it with programs that only note how they were called, and fail for arguments like `failing`."""
    log, environment = home / "log", home / "venv"
    (environment / "bin").mkdir(parents=True)
    for name in ("python", "ruff", "mypy", "lint-imports"):
        program = environment / "bin" / name
        program.write_text(JOB.format(log=log, failing=failing))
        program.chmod(0o755)
    (environment / ".installed").touch()  # newer than the lock: nothing to set up
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "check", f"VENV={environment}", *options]
    result = subprocess.run(command, cwd=ROOT, env=inherited, capture_output=True, text=True, check=False)
    return result, log.read_text()


def test_every_unit_test_is_run_once_and_every_check_too(tmp_path: Path) -> None:
    result, log = make_check(tmp_path)
    assert result.returncode == 0, result.stderr
    runs = [line.split() for line in log.splitlines()]
    counts = {name: sum(words[1].endswith(f"/{name}") for words in runs) for name in ("ruff", "mypy", "lint-imports")}
    assert counts == {"ruff": 2, "mypy": 1, "lint-imports": 1}
    targets = [ROOT / word for words in runs for word in words if word.startswith("tests/unit")]
    assert len(targets) > 5
    assert sorted(targets) == sorted((ROOT / "tests" / "unit").rglob("test_*.py")), "each file, and each once"
    assert all("tests/unit" in line for line in log.splitlines() if "-m pytest" in line), (
        "a pytest without files runs all"
    )


@pytest.mark.parametrize("failing", ["*tests/unit/trainer*", "check*", "*test_cli_promises.py*"])
def test_one_failure_fails_it_and_hides_nothing(tmp_path: Path, failing: str) -> None:
    result, log = make_check(tmp_path, "JOBS=8", failing=failing)
    assert result.returncode != 0
    assert re.search(r"^1 of (.*)\n2 of \1$", result.stdout, re.M), "torn apart, or not shown"
    expected = {"ruff", "mypy", "lint-imports", "tests/unit/adapters/", "tests/unit/plugin/"}
    assert [name for name in expected if name not in log] == [], "the others run to their end all the same"
