from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest

from vllm_scion.metrics import METRICS, Metrics

PAGE = Path(__file__).resolve().parents[3] / "docs" / "metrics.md"


def documented() -> dict[str, tuple[str, tuple[str, ...]]]:
    rows = re.findall(r"^\| `(scion_\w+)` \| (\w+) \| ([^|]*) \|", PAGE.read_text(), flags=re.MULTILINE)
    return {name: (kind, tuple(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}


def test_every_metric_is_documented_and_every_documented_metric_exists() -> None:
    assert documented() == {spec.name: (spec.type, spec.labels) for spec in METRICS}


def test_requests_are_counted_by_version_and_outcome() -> None:
    metrics = Metrics(CollectorRegistry())
    for _ in range(2):
        metrics.request("chat", 7, "chat", "ok")
    metrics.request("chat", None, "chat", "unknown")
    collected = {
        (s.labels["version"], s.labels["outcome"]): s.value
        for s in metrics["scion_requests_total"].collect()[0].samples
        if s.name.endswith("_total")
    }
    assert collected == {("7", "ok"): 2.0, ("", "unknown"): 1.0}


def test_what_alerts_watch_is_zero_before_it_first_happens() -> None:
    registry = CollectorRegistry()
    Metrics(registry)
    text = generate_latest(registry).decode()
    assert 'scion_capture_lost_total{reason="queue_full"} 0.0' in text
    assert 'scion_adapter_loads_total{outcome="failed"} 0.0' in text


def test_the_recorders_observer_sets_levels_and_adds_increments() -> None:
    metrics = Metrics(CollectorRegistry())
    metrics.queued(5)
    metrics.queued(3)
    metrics.stored(2)
    metrics.stored(2)
    metrics.lost(1, "queue_full")
    assert metrics["scion_capture_queued"]._value.get() == 3
    assert metrics["scion_capture_stored_total"]._value.get() == 4
    assert metrics["scion_capture_lost_total"].labels("queue_full")._value.get() == 1


COUNT = """
from vllm_scion.metrics import process_metrics
metrics = process_metrics()
metrics.request("chat", 7, "chat", "ok")
metrics["scion_routing_revision"].set({revision})
metrics["scion_capture_queued"].set(2)
{then}
"""
SHOW = """
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


def test_several_api_server_processes_are_combined(tmp_path: Path) -> None:
    """vLLM with --api-server-count 2 runs Prometheus in multiprocess mode: values live in files, one per process."""
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}

    def run(script: str) -> str:
        command = [sys.executable, "-c", script]
        return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout

    run(COUNT.format(revision=5, then=""))
    shown = run(COUNT.format(revision=4, then=SHOW)).splitlines()
    assert 'scion_requests_total{adapter="chat",outcome="ok",route="chat",version="7"} 2.0' in shown
    assert "scion_routing_revision 4.0" in shown  # the one that lags behind
    assert "scion_capture_queued 4.0" in shown
