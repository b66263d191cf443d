"""The journal: order, at-least-once delivery, its bound, torn writes, and taking over what a dead process left."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from scion_adapters.errors import UnavailableError
from scion_feedback.journal import Journal


def _lines(*numbers: int) -> list[bytes]:
    return [b'{"n":%d}' % number for number in numbers]


def _drained(journal: Journal) -> list[bytes]:
    lines: list[bytes] = []
    journal.drain(lines.extend)
    return lines


def _die(journal: Journal) -> None:
    """What the kernel does to a killed process: descriptors are closed, nothing else happens."""
    journal._leave_to_parent()


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal", 1 << 20)


def _segments(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.jsonl"))


def test_lines_come_in_order_and_once(journal: Journal) -> None:
    assert journal.append(_lines(1, 2)) == 2
    assert journal.append(_lines(3)) == 1
    assert journal.backlog == 3
    assert _drained(journal) == _lines(1, 2, 3)
    assert journal.backlog == journal.backlog_bytes == 0
    assert _drained(journal) == []


def test_delivered_text_does_not_stay_on_disk(journal: Journal) -> None:
    journal.append([b"secret words"])
    _drained(journal)
    assert [path.read_bytes() for path in _segments(journal.directory)] == [b""]
    journal.append([b"more"])
    assert _drained(journal) == [b"more"]
    journal.close()
    assert list(journal.directory.iterdir()) == []


def test_a_failed_batch_comes_again_and_the_delivered_ones_do_not(journal: Journal) -> None:
    journal.append(_lines(1, 2, 3, 4))
    got: list[list[bytes]] = []

    def fail_on_second(lines: list[bytes]) -> None:
        if got:
            raise UnavailableError("gone")
        got.append(lines)

    with pytest.raises(UnavailableError):
        journal.drain(fail_on_second, batch_size=2)
    assert got == [_lines(1, 2)]
    assert journal.backlog == 2
    assert _drained(journal) == _lines(3, 4)


def test_full_segments_are_deleted_one_by_one(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 1 << 20, segment_bytes=20)
    for number in range(6):
        journal.append(_lines(number))
    assert len(_segments(tmp_path)) == 2  # three lines of 8 bytes pass 20 bytes
    seen: list[int] = []

    def handler(lines: list[bytes]) -> None:
        seen.append(len(_segments(tmp_path)))

    journal.drain(handler, batch_size=3)
    assert seen == [2, 1]


def test_bound(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 3 * 8)
    assert journal.append(_lines(1, 2, 3, 4, 5)) == 3  # the first ones that fit, the rest is the caller's to count
    assert journal.append(_lines(6)) == 0
    assert _drained(journal) == _lines(1, 2, 3)
    assert journal.append(_lines(7)) == 1  # room again


def test_append_while_draining(journal: Journal) -> None:
    journal.append(_lines(1))
    got: list[bytes] = []

    def handler(lines: list[bytes]) -> None:
        if not got:
            journal.append(_lines(2))  # the writer thread, in the middle of a delivery
        got.extend(lines)

    assert journal.drain(handler) == 2
    assert got == _lines(1, 2)


def test_killed_process_is_taken_over(tmp_path: Path) -> None:
    dead = Journal(tmp_path, 1 << 20, segment_bytes=20)
    for number in range(5):
        dead.append(_lines(number))
    _die(dead)
    heir = Journal(tmp_path, 1 << 20)
    heir.append(_lines(99))
    assert heir.adopt() == 5
    assert heir.backlog == 6
    assert _drained(heir) == _lines(0, 1, 2, 3, 4, 99)  # the older ones first
    assert len(list(tmp_path.iterdir())) == 2  # the heir's lock and its own segment
    assert heir.adopt() == 0


def test_live_process_is_left_alone(tmp_path: Path) -> None:
    alive = Journal(tmp_path, 1 << 20)
    alive.append(_lines(1))
    other = Journal(tmp_path, 1 << 20)
    assert other.adopt() == 0
    assert _drained(other) == []
    assert _drained(alive) == _lines(1)


def test_only_one_heir(tmp_path: Path) -> None:
    dead = Journal(tmp_path, 1 << 20)
    dead.append(_lines(1, 2))
    _die(dead)
    first, second = Journal(tmp_path, 1 << 20), Journal(tmp_path, 1 << 20)
    assert first.adopt() == 2
    assert second.adopt() == 0  # also before the first one drained
    assert _drained(first) == _lines(1, 2)


def test_heir_that_dies_too_passes_it_on(tmp_path: Path) -> None:
    dead = Journal(tmp_path, 1 << 20)
    dead.append(_lines(1, 2))
    _die(dead)
    heir = Journal(tmp_path, 1 << 20)
    heir.adopt()
    _die(heir)
    last = Journal(tmp_path, 1 << 20)
    assert last.adopt() == 2
    assert _drained(last) == _lines(1, 2)
    last.close()
    assert list(tmp_path.iterdir()) == []


def test_close_without_drain_leaves_it_to_the_next(tmp_path: Path) -> None:
    first = Journal(tmp_path, 1 << 20)
    first.append(_lines(1))
    first.close()
    second = Journal(tmp_path, 1 << 20)
    assert second.adopt() == 1
    assert _drained(second) == _lines(1)


def test_torn_last_line_is_handed_over_like_any_other(tmp_path: Path) -> None:
    dead = Journal(tmp_path, 1 << 20)
    dead.append(_lines(1))
    _die(dead)
    with _segments(tmp_path)[0].open("ab") as file:
        file.write(b'{"n":')  # killed inside a write
    heir = Journal(tmp_path, 1 << 20)
    assert heir.adopt() == 2
    assert _drained(heir) == [b'{"n":1}', b'{"n":']
    assert heir.backlog == heir.backlog_bytes == 0


def test_disk_full_leaves_no_torn_line(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    journal.append(_lines(1))
    real_write = os.write

    def full(file: int, data: bytes) -> int:
        if len(data) > 4:
            return real_write(file, bytes(data[:4]))  # a part still fitted
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(OSError, match="No space"):
            journal.append(_lines(2))
    assert journal.backlog == 1
    journal.append(_lines(3))
    assert _drained(journal) == _lines(1, 3)


def test_disk_that_cannot_even_shrink_begins_a_new_segment(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    journal.append(_lines(1))

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", broken)
        patch.setattr(os, "ftruncate", broken)
        with pytest.raises(OSError, match="Input/output"):
            journal.append(_lines(2))  # reached the file, but not surely the disk
    journal.append(_lines(3))
    assert _drained(journal) == _lines(1, 3)


@pytest.mark.parametrize("harm", ["removed", "cut"])
def test_files_that_somebody_took_do_not_block_the_rest(tmp_path: Path, harm: str) -> None:
    journal = Journal(tmp_path, 1 << 20, segment_bytes=10)
    for number in range(4):
        journal.append(_lines(number))  # segments of two lines
    first = _segments(tmp_path)[0]
    if harm == "removed":
        first.unlink()
    else:
        os.truncate(first, 0)
    assert _drained(journal) == _lines(2, 3)
    assert journal.num_vanished == 2
    assert journal.backlog == journal.backlog_bytes == 0
    journal.append(_lines(4))
    assert _drained(journal) == _lines(4)


def test_forked_child_does_not_keep_the_dead_alive(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 1 << 20)
    journal.append(_lines(1))
    ready, child_is_ready = os.pipe()
    child_may_end, end = os.pipe()
    child = os.fork()
    if child == 0:  # lives on, as an engine process may after its server was killed
        os.close(end)
        os.write(child_is_ready, b"x")
        os.read(child_may_end, 1)
        os._exit(0)
    try:
        os.read(ready, 1)
        _die(journal)
        heir = Journal(tmp_path, 1 << 20)
        assert heir.adopt() == 1
        assert _drained(heir) == _lines(1)
    finally:
        os.close(end)
        os.waitpid(child, 0)
        for descriptor in (ready, child_is_ready, child_may_end):
            os.close(descriptor)


def test_unusable_directory_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UnavailableError, match=r"cannot be opened.*capture\.journal"):
        Journal(tmp_path / "file", 1 << 20)


def test_closed_journal_refuses(journal: Journal) -> None:
    journal.close()
    with pytest.raises(OSError, match="closed"):
        journal.append(_lines(1))


def test_writer_and_drainer_at_the_same_time(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 1 << 20, segment_bytes=100, fsync=False)
    written = threading.Event()
    got: list[bytes] = []

    def write() -> None:
        for number in range(0, 2000, 2):
            assert journal.append(_lines(number, number + 1)) == 2
        written.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not written.is_set():
        journal.drain(got.extend, batch_size=7)
    writer.join()
    journal.drain(got.extend)
    assert got == _lines(*range(2000))
