"""Our metrics, which vLLM's own `/metrics` shows. `METRICS` is the source; docs/metrics.md is checked against it.

With several API server processes vLLM runs Prometheus in multiprocess mode; gauges say here how they are combined then.
Labels are bound once and the bound child is kept (`Metrics.request`): looking labels up costs more than counting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from scion_adapters.records import VersionRef, is_step_line

_OVERHEAD_BUCKETS = (25e-6, 50e-6, 100e-6, 200e-6, 300e-6, 500e-6, 1e-3, 2e-3, 5e-3, 1e-2, 5e-2)
_LOAD_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


@dataclass(frozen=True, slots=True)
class MetricSpec:
    name: str
    type: Literal["counter", "gauge", "histogram"]
    labels: tuple[str, ...]
    help: str
    buckets: Sequence[float] = ()
    multiprocess: Literal["livesum", "livemin", "livemax"] = "livesum"
    known: tuple[str, ...] = ()  # values of the only label that are shown as 0 from the start, for alerts on increases


METRICS = (
    MetricSpec(
        "scion_requests_total",
        "counter",
        ("adapter", "version", "route", "outcome"),
        "Requests routed to a version. Outcome: ok, cancelled (the client went away), rejected (4xx), error (5xx), "
        "unknown (404: no such version), unavailable (503: no version could serve).",
    ),
    MetricSpec(
        "scion_request_overhead_seconds",
        "histogram",
        ("route",),
        "Time that routing and recording add to a request on the server's event loop.",
        buckets=_OVERHEAD_BUCKETS,
    ),
    MetricSpec(
        "scion_in_flight_requests", "gauge", ("adapter", "version"), "Requests that a version is answering now."
    ),
    MetricSpec("scion_capture_queued", "gauge", (), "Answers in memory that wait to be written to the journal."),
    MetricSpec(
        "scion_capture_journal_records", "gauge", (), "Answers in the local journal that wait for the database."
    ),
    MetricSpec("scion_capture_stored_total", "counter", (), "Answers recorded in the database."),
    MetricSpec(
        "scion_capture_lost_total",
        "counter",
        ("reason",),
        "Answers that could not be recorded. Reason: queue_full, journal_full, journal_error (the disk), unparsable, "
        "corrupt_journal (a line torn by a crash), refused (by the database), closed.",
        known=("queue_full", "journal_full", "journal_error", "unparsable", "corrupt_journal", "refused", "closed"),
    ),
    MetricSpec(
        "scion_capture_conflicts_total",
        "counter",
        (),
        "Answers not recorded because another answer has the same id (clients that reuse X-Request-Id).",
    ),
    MetricSpec(
        "scion_feedback_total",
        "counter",
        ("outcome",),
        "Votes received. Outcome: created, repeated (a safe retry), deleted, conflict, invalid, unavailable, error.",
        known=("created", "repeated", "deleted", "conflict", "invalid", "unavailable", "error"),
    ),
    MetricSpec(
        "scion_routing_revision",
        "gauge",
        (),
        "The routing that this server acts on; all servers should show the same within a second.",
        multiprocess="livemin",
    ),
    MetricSpec("scion_resident_versions", "gauge", (), "Versions that the engine holds.", multiprocess="livemax"),
    MetricSpec(
        "scion_failed_versions", "gauge", (), "Versions that should be loaded and could not be.", multiprocess="livemax"
    ),
    MetricSpec(
        "scion_adapter_loads_total",
        "counter",
        ("outcome",),
        "Attempts to load a version into the engine. Outcome: ok, failed.",
        known=("ok", "failed"),
    ),
    MetricSpec(
        "scion_adapter_unloads_total", "counter", (), "Versions removed from the engine after they were drained."
    ),
    MetricSpec(
        "scion_adapter_load_seconds", "histogram", (), "Time to verify and load a version.", buckets=_LOAD_BUCKETS
    ),
    MetricSpec(
        "scion_rollout_active",
        "gauge",
        ("adapter",),
        "1 while a rollout of the adapter is under way, paused or not.",
        multiprocess="livemax",
    ),
    MetricSpec(
        "scion_rollout_weight",
        "gauge",
        ("adapter",),
        "The challenger's share of users, 0 to 1; 0 while servers still load it.",
        multiprocess="livemax",
    ),
    MetricSpec("scion_controller_ticks_total", "counter", (), "Times this server looked after the active rollouts."),
    MetricSpec("scion_controller_lease_held", "gauge", (), "1 in the server process that looks after the rollouts."),
    MetricSpec(
        "scion_access_refused_total",
        "counter",
        ("reason",),
        "Requests refused for want of a key. Reason: missing, unknown, revoked, scope.",
        known=("missing", "unknown", "revoked", "scope"),
    ),
    MetricSpec(
        "scion_database_errors_total",
        "counter",
        ("operation",),
        "Database operations of the server's loops that failed. Operation: routing, listen, report, lease, controller, "
        "files, refusals.",
        known=("routing", "listen", "report", "lease", "controller", "files", "refusals"),
    ),
)


def shown_as(ref: VersionRef) -> tuple[str, int | None]:
    """(adapter, number) of a version in metrics. Steps of runs are one: a server outlives thousands of them."""
    return ("steps", None) if is_step_line(ref.adapter) else (ref.adapter, ref.number)


def labels_of(ref: VersionRef) -> tuple[str, str]:
    """`shown_as` as labels."""
    adapter, number = shown_as(ref)
    return adapter, "" if number is None else str(number)


class Metrics:
    """The metrics of one process. `metrics["scion_…"]` is the collector; hot ones have methods."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._collectors: dict[str, Any] = {spec.name: _make(spec, registry) for spec in METRICS}
        self._requests: dict[tuple[str, int | None, str, str], Counter] = {}

    def __getitem__(self, name: str) -> Any:
        return self._collectors[name]

    def request(self, adapter: str, number: int | None, route: str, outcome: str) -> None:
        """Count one request; `number` None: no version was found for it, or it was of no lasting one."""
        key = (adapter, number, route, outcome)
        child = self._requests.get(key)
        if child is None:
            child = self._collectors["scion_requests_total"].labels(
                adapter, "" if number is None else str(number), route, outcome
            )
            self._requests[key] = child
        child.inc()

    # The recorder's observer (scion_feedback.recorder.RecorderObserver); called from its threads.

    def queued(self, n: int) -> None:
        self._collectors["scion_capture_queued"].set(n)

    def journaled(self, n: int) -> None:
        self._collectors["scion_capture_journal_records"].set(n)

    def stored(self, n: int) -> None:
        self._collectors["scion_capture_stored_total"].inc(n)

    def lost(self, n: int, reason: str) -> None:
        self._collectors["scion_capture_lost_total"].labels(reason).inc(n)

    def conflicting(self, n: int) -> None:
        self._collectors["scion_capture_conflicts_total"].inc(n)


@lru_cache(maxsize=1)
def process_metrics() -> Metrics:
    """The metrics on the default registry; a collector can be registered there only once."""
    return Metrics()


def _make(spec: MetricSpec, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    if spec.type == "counter":
        counter = Counter(spec.name, spec.help, spec.labels, registry=registry)
        for value in spec.known:
            counter.labels(value)
        return counter
    if spec.type == "gauge":
        return Gauge(spec.name, spec.help, spec.labels, registry=registry, multiprocess_mode=spec.multiprocess)
    return Histogram(spec.name, spec.help, spec.labels, registry=registry, buckets=tuple(spec.buckets))
