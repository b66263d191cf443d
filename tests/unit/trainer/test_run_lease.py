from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from scion_adapters.database import Database
from scion_adapters.errors import ConflictError
from scion_adapters.leases import HeldLease, current_holder, try_acquire
from scion_trainer import run_lease
from scion_trainer.run_lease import Holder, claim, free_if_dead, hand_over, lease_name, working_on
from tests.helpers.databases import sqlite_database


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = sqlite_database(tmp_path)
    yield database
    database.dispose()


@pytest.fixture
def dead() -> Holder:
    """A process of this host that has gone."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        holder = Holder.of("run-dead", process.pid)
        assert not holder.is_dead()
        process.kill()
    return holder


def test_a_holder_is_written_and_read() -> None:
    holder = Holder.of("run-1")
    assert Holder.parse(str(holder)) == holder
    assert len(str(holder)) <= 128
    assert Holder.parse("somebody") is None
    assert Holder.parse("run-1/host/1/yesterday") is None


def test_only_one_run_per_adapter_and_the_error_names_it(database: Database) -> None:
    claim(database, "chat", Holder.of("run-1"))
    assert working_on(database, "chat") == Holder.of("run-1")
    with pytest.raises(ConflictError, match="chat is being trained by run-1"):
        claim(database, "chat", Holder.of("run-2"))
    claim(database, "support", Holder.of("run-2"))  # another adapter is not concerned


def test_a_dead_process_does_not_keep_the_lease(database: Database, dead: Holder) -> None:
    assert try_acquire(database, lease_name("chat"), str(dead), 1000)
    assert working_on(database, "chat") is None
    claim(database, "chat", Holder.of("run-2"))
    assert working_on(database, "chat") == Holder.of("run-2")


def test_a_reused_process_number_is_another_process() -> None:
    mine = Holder.of("run-1")
    ticks, boot = mine.started.split("@")
    assert replace(mine, started=f"{int(ticks) - 100}@{boot}").is_dead()
    assert replace(mine, started=f"{ticks}@{'0' * 12}").is_dead()  # the host was started again
    assert not mine.is_dead()


@pytest.mark.parametrize("set_by_s", [-3600, 3600])
def test_a_live_process_lives_when_the_clock_is_set(monkeypatch: pytest.MonkeyPatch, set_by_s: int) -> None:
    mine, started = Holder.of("run-1"), psutil.Process().create_time()
    monkeypatch.setattr(psutil.Process, "create_time", lambda _process: started + set_by_s)
    assert not mine.is_dead()
    assert Holder.of("run-1") == mine


def test_a_holder_of_an_old_release_is_dead_only_when_its_process_is_gone(database: Database, dead: Holder) -> None:
    """Such a one has its start in Unix seconds, which do not agree after the clock was set."""
    mine = Holder.of("run-1")
    old = f"run-1/{mine.host}/{mine.pid}/{int(psutil.Process().create_time()) - 3600}"
    assert try_acquire(database, lease_name("chat"), old, 1000)
    free_if_dead(database, lease_name("chat"))
    assert str(working_on(database, "chat")) == old
    gone = Holder.parse(f"run-dead/{dead.host}/{dead.pid}/1700000000")
    assert gone is not None
    assert gone.is_dead()


def test_without_a_boot_id_the_start_is_what_psutil_gives(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    known = Holder.of("run-1")
    monkeypatch.setattr(run_lease, "BOOT_ID", tmp_path / "none")
    mine = Holder.of("run-1")
    assert mine.started == str(int(psutil.Process().create_time()))
    assert Holder.parse(str(mine)) == mine
    assert not mine.is_dead()
    assert not known.is_dead()  # two ways of telling say nothing about each other


def test_another_hosts_process_is_not_judged(database: Database, dead: Holder) -> None:
    elsewhere = replace(dead, host="elsewhere")
    assert try_acquire(database, lease_name("chat"), str(elsewhere), 1000)
    free_if_dead(database, lease_name("chat"))
    assert working_on(database, "chat") == elsewhere
    with pytest.raises(ConflictError, match=r"run-dead .* on elsewhere"):
        claim(database, "chat", Holder.of("run-2"))


def test_the_lease_is_handed_over_without_a_gap(database: Database) -> None:
    parent = Holder.of("run-1")
    child = replace(parent, started="1@0123456789ab")
    claim(database, "chat", parent)
    assert hand_over(database, "chat", str(parent), child)
    assert current_holder(database, lease_name("chat")) == str(child)
    assert not hand_over(database, "chat", str(parent), child)  # it is not the parent's any more
    with HeldLease(database, lease_name("chat"), str(child)):  # the child renews what it was given
        pass
    assert current_holder(database, lease_name("chat")) is None
