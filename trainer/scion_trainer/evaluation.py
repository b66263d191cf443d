"""One evaluation of one version, from the lease to the verdict: load it on every server, run the gates, report, decide.

Owns the order of things and the clean-up. What is measured, and what is good enough, stands in gates/; how a verdict
becomes a state stands in the registry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from scion_adapters import events, tables
from scion_adapters.aliases import evaluation_lease
from scion_adapters.clock import Clock, new_id, now
from scion_adapters.database import Database
from scion_adapters.errors import ConflictError, NotFoundError, UnavailableError
from scion_adapters.fingerprint import BaseInfo, base_info
from scion_adapters.leases import HeldLease
from scion_adapters.records import BASE_NUMBER, Version, VersionRef, VersionState
from scion_adapters.registry import Registry
from scion_adapters.settings import Settings
from scion_feedback.findings import record_findings
from scion_feedback.snapshots import Snapshot, load_snapshot
from scion_trainer.answer_memory import RememberingServer
from scion_trainer.chat_tokens import ChatTokens, load_chat_tokens
from scion_trainer.gates import GATES
from scion_trainer.gates.retention import load_items
from scion_trainer.gates.types import EarlierHoldout, Gate, GateContext, GateResult, Models, Progress, Verdict
from scion_trainer.loading import loaded
from scion_trainer.report import Report, overall, write_report
from scion_trainer.reward_judge import open_judge
from scion_trainer.server_client import ModelServer, ServerClient


def evaluate(
    settings: Settings,
    ref: VersionRef,
    *,
    database: Database,
    registry: Registry,
    snapshot: Snapshot | None = None,
    actor: str = "gates",
    progress: Progress = lambda what, done, total: None,
    clock: Clock | None = None,
    server: ModelServer | None = None,
    tokens: ChatTokens | None = None,
    gates: Sequence[Gate] = GATES,
) -> Report:
    """Evaluate `ref`, write its report, and accept or reject it if it is a candidate. Returns the report.

    `snapshot` None: the one that the version was trained on, if there is one. A candidate whose servers are away stays
    a candidate: the report's verdict is then `unmeasurable` and its reason the remedy. An accepted version keeps its
    state.

    Raises NotFoundError for an unknown version, ConflictError when it is rejected, retired or being evaluated already.
    """
    version = registry.version(ref)
    if version.state not in (VersionState.CANDIDATE, VersionState.ACCEPTED):
        raise ConflictError(
            f"{ref} is {version.state.value} ({version.reason or 'no reason kept'}); publish a new version instead"
        )
    with HeldLease(database, evaluation_lease(ref), new_id("evaluation")) as lease, ExitStack() as stack:
        time_now = clock or now
        started = time_now()
        snapshot = snapshot or _own_snapshot(database, version)
        base = base_info(settings)
        parent = _comparable_parent(registry, version)
        keys = {str(v.ref): v.evaluation_key for v in (version, parent) if v is not None}
        if server is None:
            server = stack.enter_context(ServerClient(settings, evaluation_keys=keys))
        chat_tokens = tokens or load_chat_tokens(settings)
        context = GateContext(
            settings=settings,
            version=version,
            artifact=lambda: registry.store.path(version.digest),
            verify_artifact=lambda: registry.store.verify(version.digest),
            base_info=base,
            models=Models(
                candidate=str(ref),
                parent=str(parent.ref) if parent else settings.base.served_name,
                base=settings.base.served_name,
            ),
            server=RememberingServer(server),
            tokens=chat_tokens,
            rows=snapshot.rows if snapshot else (),
            retention=load_items(settings),
            seed=settings.trainer.seed,
            progress=progress,
            earlier=_earlier_holdouts(registry, database, version, snapshot),
            run_directory=_run_directory(database, version),
            evaluation_keys=keys,
            judge=lambda: open_judge(
                settings, database, ref.adapter, base_fingerprint=base.fingerprint, tokens=chat_tokens
            ),
        )
        results, away = _run_gates(gates, context, registry, database, parent, clock)
        verdict, reason = overall(results, away=away)
        report = Report(
            ref=ref,
            verdict=verdict,
            reason=reason,
            gates=tuple(results),
            created_at=started,
            seconds=time_now() - started,
            lineage=_lineage(database, version, parent, snapshot, base),
        )
        record_findings(database, ref, [finding for gate in results for finding in gate.findings], time_now)
        write_report(report, registry.store.report_path(ref))
        registry.store.sync_report(ref)
        if lease.lost.is_set():
            raise ConflictError(f"the evaluation of {ref} lost its lease, another one may run; evaluate it again")
        _conclude(report, version, registry, database, actor, time_now)
        return report


def _run_gates(
    gates: Sequence[Gate],
    context: GateContext,
    registry: Registry,
    database: Database,
    parent: Version | None,
    clock: Clock | None,
) -> tuple[list[GateResult], str | None]:
    """The results, and why the serving engine could not be asked if it could not. A broken artifact is never loaded."""
    results = [gate.run(context) for gate in gates if not gate.needs_server]
    if any(result.verdict is Verdict.FAIL for result in results):
        return results, None
    remaining = [gate for gate in gates if gate.needs_server]
    try:
        needed = [version for version in (context.version, parent) if version is not None]
        with loaded(
            needed, context.base_info, context.settings, registry, database, progress=context.progress, clock=clock
        ):
            context = replace(context, max_length=_max_length(context))
            while remaining:
                results.append(remaining[0].run(context))
                remaining.pop(0)
    except (UnavailableError, NotFoundError) as error:
        away = f"{error}. Then run: scion evaluate {context.version.ref}"
        results += [
            GateResult(gate.name, Verdict.UNMEASURABLE, "the serving engine could not be asked") for gate in remaining
        ]
        return results, away
    return results, None


def _max_length(context: GateContext) -> int:
    """Tokens that prompt and answer may have together: what runs train on, within what the server takes."""
    configured, served = context.settings.trainer.max_length, context.server.max_length()
    return min(configured, served) if served else configured


def _comparable_parent(registry: Registry, version: Version) -> Version | None:
    """The parent, or None for the base: then the candidate is compared with the base itself."""
    if version.parent == BASE_NUMBER:
        return None
    parent = registry.version(VersionRef(version.adapter, version.parent))
    return parent if parent.state is VersionState.ACCEPTED else None


def _own_snapshot(database: Database, version: Version) -> Snapshot | None:
    """None when there is none, or it was cleaned up: the held-out gate then says that it could not measure."""
    if version.snapshot_id is None:
        return None
    with database.read() as connection:
        query = sa.select(tables.snapshots.c.path).where(tables.snapshots.c.id == version.snapshot_id)
        path = connection.execute(query).scalar()
    if path is None:
        return None
    try:
        return load_snapshot(path)
    except NotFoundError:  # cleaned up, or on another host
        return None


def _earlier_holdouts(
    registry: Registry, database: Database, version: Version, own: Snapshot | None
) -> tuple[EarlierHoldout, ...]:
    """The held-out rows of every version before this one that ever passed the gates, each row with the oldest."""
    found: list[EarlierHoldout] = []
    snapshots: set[str] = set() if own is None else {own.id}
    rows: set[str] = set()
    for earlier in registry.versions(version.adapter):
        passed = earlier.state in (VersionState.ACCEPTED, VersionState.RETIRED)
        if earlier.number >= version.number or not passed or earlier.snapshot_id in snapshots:
            continue
        if (snapshot := _own_snapshot(database, earlier)) is None:
            continue
        snapshots.add(snapshot.id)
        new = tuple(row for row in snapshot.split("heldout") if row.feedback_id not in rows)
        rows.update(row.feedback_id for row in new)
        if new:
            found.append(EarlierHoldout(earlier.number, new))
    return tuple(found)


def _run_directory(database: Database, version: Version) -> Path | None:
    """Where the run that made the version worked, if that is on this host."""
    if version.run_id is None:
        return None
    with database.read() as connection:
        query = sa.select(tables.runs.c.directory).where(tables.runs.c.id == version.run_id)
        directory = connection.execute(query).scalar()
    return Path(directory) if directory is not None else None


def _lineage(
    database: Database, version: Version, parent: Version | None, snapshot: Snapshot | None, base: BaseInfo
) -> Mapping[str, Any]:
    run: Mapping[str, Any] = {}
    if version.run_id is not None:
        with database.read() as connection:
            row = (
                connection.execute(sa.select(tables.runs).where(tables.runs.c.id == version.run_id)).mappings().first()
            )
        run = {"config": row["config"], "metrics": row["metrics"]} if row else {}
    return {
        "digest": version.digest,
        "rank": version.rank,
        "parent": f"{version.adapter}:{version.parent}" if version.parent else "base",
        "compared_with": str(parent.ref) if parent else "base",
        "base_fingerprint": base.fingerprint,
        "recipe": version.recipe,
        "run": version.run_id,
        "snapshot": snapshot.id if snapshot else version.snapshot_id,
        "snapshot_rows": len(snapshot.rows) if snapshot else None,
        "snapshot_manifest": dict(snapshot.manifest) if snapshot else None,
        "created_by": version.created_by,
        **run,
    }


def _conclude(
    report: Report, version: Version, registry: Registry, database: Database, actor: str, clock: Clock
) -> None:
    with database.write() as connection:
        events.record(
            connection,
            clock(),
            "version.evaluated",
            actor=actor,
            reason=report.reason,
            adapter=version.adapter,
            number=version.number,
            data={"verdict": report.verdict.value, "figures": report.figures},
        )
    if version.state is not VersionState.CANDIDATE:
        return
    if report.verdict is Verdict.PASS:
        registry.accept(version.ref, actor=actor, reason=report.reason, metrics=report.figures)
    elif report.verdict is Verdict.FAIL:
        registry.reject(version.ref, actor=actor, reason=report.reason)
