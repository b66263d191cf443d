"""deploy/ fits what was built: its variables are settings, its alerts use our metrics, its files pass their tools."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from pydantic import BaseModel

from scion_adapters.settings import CONFIG_ENV, Settings
from vllm_scion.metrics import METRICS

ROOT = Path(__file__).resolve().parents[3]
DEPLOY = ROOT / "deploy"
COMPOSE = [DEPLOY / "compose.yaml", DEPLOY / "compose.cuda.yaml"]
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
ALERT_TESTS = sorted(file.name for file in ALERTS.parent.glob("alerts*_test.yml"))
SECRETS = {"POSTGRES_PASSWORD": "pw-of-this-test", "HASH_KEY": "key-of-this-test", "API_KEY": "token-of-this-test"}


def _load(path: Path) -> dict[str, Any]:
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(document, dict)
    return document


def _environments() -> dict[str, str]:
    """Every variable that the compose files give our own containers."""
    found: dict[str, str] = {}
    for file in COMPOSE:
        for name in ("server", "trainer"):
            found |= _load(file)["services"][name].get("environment", {})
    return found


def _is_setting(variable: str) -> bool:
    """SCION_<SECTION>__<KEY> that names a field of Settings."""
    model: type[BaseModel] = Settings
    parts = variable.removeprefix("SCION_").lower().split("__")
    for number, part in enumerate(parts, 1):
        field = model.model_fields.get(part)
        if field is None:
            return False
        if number < len(parts):
            if not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
                return False
            model = field.annotation
    return True


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        ("SCION_SERVER__PORT", True),  # a field of a section
        ("SCION_TRAINER__LORA__RANK", True),  # a field of a section's section
        ("SCION_SERVER__PROT", False),  # a typing error
        ("SCION_SERVER__PORT__X", False),  # below a plain field
        ("SCION_PORT", False),  # no section
    ],
)
def test_a_variable_is_told_from_a_typing_error(variable: str, expected: bool) -> None:
    assert _is_setting(variable) is expected


def test_every_variable_in_compose_is_a_setting() -> None:
    ours = [name for name in _environments() if name.startswith("SCION_")]
    assert len(ours) > 8
    assert [name for name in ours if name != CONFIG_ENV and not _is_setting(name)] == []


@pytest.mark.parametrize("dockerfile", ["cpu.Dockerfile", "cuda.Dockerfile"])
def test_every_variable_in_the_images_is_a_setting(dockerfile: str) -> None:
    ours = re.findall(r"\bSCION_[A-Z_]+\b", (DEPLOY / dockerfile).read_text(encoding="utf-8"))
    assert ours
    assert [name for name in ours if not _is_setting(name)] == []


def test_the_settings_accept_what_compose_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in _environments().items():
        monkeypatch.setenv(name, _interpolate(str(value)))
    settings = Settings(home=tmp_path)
    assert settings.database.url == "postgresql+psycopg://scion:pw-of-this-test@postgres:5432/scion"
    assert settings.privacy.hash_key == "key-of-this-test"
    assert settings.server.extra_args == ("--gpu-memory-utilization", "0.55")


def _interpolate(value: str) -> str:
    """Compose's ${NAME:-default} and ${NAME:?message}, with the secrets of this test."""
    return re.sub(r"\$\{(\w+):([-?])([^}]*)\}", lambda m: m[3] if m[2] == "-" else SECRETS[m[1]], value)


@pytest.mark.parametrize("name", sorted(SECRETS))
def test_a_secret_has_no_default(name: str) -> None:
    text = "\n".join(file.read_text(encoding="utf-8") for file in COMPOSE)
    uses = re.findall(rf"\$\{{{name}(..)", text)
    assert uses, f"{name} is not used"
    assert set(uses) == {":?"}


def test_everything_published_is_published_to_this_machine_only() -> None:
    for name, service in _load(COMPOSE[0])["services"].items():
        for port in service.get("ports", ()):
            assert _interpolate(port).startswith("127.0.0.1:"), f"{name} publishes {port} to the world"


def test_images_copy_everything_that_the_wheel_is_made_of() -> None:
    allowed = {
        line[1:] for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line.startswith("!")
    }
    for dockerfile in ("cpu.Dockerfile", "cuda.Dockerfile"):
        text = (DEPLOY / dockerfile).read_text(encoding="utf-8")
        copied = {
            Path(word).as_posix() for line in re.findall(r"^COPY (?!--)(.*)$", text, re.M) for word in line.split()[:-1]
        }
        assert {"adapters", "feedback", "trainer", "plugin", "deploy/demo", "pyproject.toml"} <= copied
        assert {path for path in copied if path not in allowed} == set(), "copied, but left out by .dockerignore"
        assert all((ROOT / path).exists() for path in copied)
        assert re.search(r"^USER (?!root)", text, re.M), "the image runs as root"


def test_every_metric_in_an_alert_exists() -> None:
    known: set[str] = set()
    for spec in METRICS:
        known |= {spec.name} if spec.type != "histogram" else {spec.name + end for end in ("_bucket", "_sum", "_count")}
    for group in _load(ALERTS)["groups"]:
        for rule in group["rules"]:
            used = set(re.findall(r"\bscion_\w+", rule["expr"]))
            assert used <= known, f"{rule['alert']} uses {sorted(used - known)}, which no server exports"


def test_alerts_group_by_labels_that_their_metric_has() -> None:
    labels = {spec.name: set(spec.labels) for spec in METRICS}
    for group in _load(ALERTS)["groups"]:
        for rule in group["rules"]:
            for name, selector in re.findall(r"\b(scion_\w+)\{([^}]*)\}", rule["expr"]):
                assert set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector)) <= labels[name], rule["alert"]


def test_every_alert_has_a_test_and_says_what_to_do() -> None:
    tests = [test for name in ALERT_TESTS for test in _load(ALERTS.with_name(name))["tests"]]
    tested = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case.get("exp_alerts")}
    for group in _load(ALERTS)["groups"]:
        for rule in group["rules"]:
            assert rule["annotations"].keys() == {"summary", "action"}, rule["alert"]
            assert rule["alert"] in tested, f"{rule['alert']} never fires in {ALERT_TESTS}"


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "config", "prometheus.yml"],  # the scrape configuration, and that the rule file is where it says
        ["check", "rules", "alerts.yml"],  # every expression parses
        ["test", "rules", *ALERT_TESTS],  # every alert fires when it should, and only then
    ],
)
def test_promtool_accepts_the_prometheus_files(arguments: list[str]) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed (Debian: the package prometheus)")
    result = subprocess.run(
        ["promtool", *arguments], cwd=DEPLOY / "prometheus", capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def _compose() -> list[str]:
    for command in (["docker", "compose"], ["docker-compose"]):
        if (
            shutil.which(command[0])
            and subprocess.run([*command, "version"], capture_output=True, check=False).returncode == 0
        ):
            return command
    pytest.skip("neither `docker compose` nor `docker-compose` is installed")


@pytest.mark.parametrize("files", [COMPOSE[:1], COMPOSE], ids=["cpu", "cuda"])
def test_compose_accepts_its_files(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    command = [*_compose(), *(part for file in files for part in ("-f", str(file))), "config"]
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    services = yaml.safe_load(result.stdout)["services"]
    assert services.keys() == {"server", "trainer", "postgres", "prometheus"}
    assert services["server"]["image"] == ("vllm-scion:cpu" if len(files) == 1 else "vllm-scion:cuda")


@pytest.mark.parametrize("missing", sorted(SECRETS))
def test_compose_refuses_to_start_without_a_secret(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [*_compose(), "-f", str(COMPOSE[0]), "config"]
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value) if name != missing else monkeypatch.delenv(name, raising=False)
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert f"set {missing}" in result.stderr
