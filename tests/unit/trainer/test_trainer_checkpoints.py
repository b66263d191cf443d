from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from scion_trainer.checkpoints import MARKER, CorruptCheckpointError, mark_complete, newest_complete


def write_checkpoint(directory: Path, step: int, *, complete: bool = True) -> Path:
    checkpoint = directory / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "adapter_model.safetensors").write_bytes(b"weights" * step)
    (checkpoint / "optimizer.pt").write_bytes(b"moments" * step)
    if complete:
        mark_complete(checkpoint)
    return checkpoint


def test_a_run_without_checkpoints_begins_at_the_beginning(tmp_path: Path) -> None:
    found = newest_complete(tmp_path / "checkpoints")
    assert (found.path, found.step, found.notes) == (None, 0, ())


def test_the_newest_complete_one_is_found_by_number_not_by_name(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 9)
    newest = write_checkpoint(tmp_path, 10)
    assert newest_complete(tmp_path).path == newest


def test_one_that_was_being_written_is_removed_and_said(tmp_path: Path) -> None:
    good = write_checkpoint(tmp_path, 20)
    half = write_checkpoint(tmp_path, 40, complete=False)
    found = newest_complete(tmp_path)
    assert (found.path, found.step) == (good, 20)
    assert "checkpoint-40 was being written" in found.notes[0]
    assert not half.exists()  # or transformers would count it when it deletes old ones


def test_only_an_unfinished_one_means_from_the_beginning(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 20, complete=False)
    assert newest_complete(tmp_path).path is None


def truncate(checkpoint: Path) -> None:
    (checkpoint / "optimizer.pt").write_bytes(b"mom")


def flip(checkpoint: Path) -> None:
    weights = checkpoint / "adapter_model.safetensors"
    weights.write_bytes(b"W" + weights.read_bytes()[1:])


def remove(checkpoint: Path) -> None:
    (checkpoint / "optimizer.pt").unlink()


def spoil_marker(checkpoint: Path) -> None:
    (checkpoint / MARKER).write_text("{")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, "optimizer.pt has changed"),
        (flip, "adapter_model.safetensors has changed"),  # same size, other bytes
        (remove, "optimizer.pt is missing"),
        (spoil_marker, "cannot be read"),
    ],
)
def test_damage_falls_back_to_the_one_before(tmp_path: Path, damage: Callable[[Path], None], said: str) -> None:
    good = write_checkpoint(tmp_path, 20)
    damage(write_checkpoint(tmp_path, 40))
    found = newest_complete(tmp_path)
    assert found.path == good
    assert said in found.notes[0]


def test_all_damaged_is_an_error_with_the_remedy(tmp_path: Path) -> None:
    truncate(write_checkpoint(tmp_path, 20))
    flip(write_checkpoint(tmp_path, 40))
    with pytest.raises(CorruptCheckpointError, match=r"checkpoint-40.*checkpoint-20.*without --resume"):
        newest_complete(tmp_path)
