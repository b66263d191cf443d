"""The keyed hash of user names, and the key file."""

from __future__ import annotations

import logging
import stat
import threading
from pathlib import Path

import pytest

from scion_adapters.errors import InvalidInputError
from scion_adapters.sections.serving import PrivacySection
from scion_adapters.settings import Settings, load_settings
from scion_feedback.privacy import UserHasher, open_hasher


def _settings(home: Path, **privacy: str) -> Settings:
    file = home / "scion.toml"
    file.write_text("")
    return load_settings(file, overrides={"privacy": PrivacySection(**privacy)})


def test_hash_depends_on_user_and_key() -> None:
    one, other = UserHasher(b"k" * 16), UserHasher(b"l" * 16)
    assert one.hash("alice") == one.hash("alice")
    assert len({one.hash("alice"), one.hash("bob"), other.hash("alice")}) == 3
    assert len(one.hash("alice")) == 32
    int(one.hash("alice"), 16)


def test_hash_takes_any_string() -> None:
    # Clients send what they like; half a surrogate pair can come out of JSON.
    assert UserHasher(b"k" * 16).hash("\ud800") != UserHasher(b"k" * 16).hash("")


def test_key_does_not_show_in_logs() -> None:
    assert "kkkk" not in repr(UserHasher(b"k" * 16))


def test_short_key_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="15 bytes; at least 16") as caught:
        UserHasher(b"k" * 15)
    assert caught.value.field == "privacy.hash_key"


def test_key_file_is_made_once_and_private(tmp_path: Path) -> None:
    settings = _settings(tmp_path, hash_key_file="keys/user.key")
    first = open_hasher(settings).hash("alice")
    assert open_hasher(settings).hash("alice") == first
    file = tmp_path / "keys" / "user.key"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(file.parent.iterdir()) == [file]


def test_processes_that_start_together_agree_on_the_key(tmp_path: Path) -> None:
    settings = _settings(tmp_path)
    barrier = threading.Barrier(8)
    hashes: list[str] = []

    def start() -> None:
        barrier.wait()
        hashes.append(open_hasher(settings).hash("alice"))

    threads = [threading.Thread(target=start) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(hashes) == 8
    assert len(set(hashes)) == 1


def test_configured_key_wins_over_the_file(tmp_path: Path) -> None:
    hasher = open_hasher(_settings(tmp_path, hash_key="0123456789abcdef"))
    assert hasher.hash("alice") == UserHasher(b"0123456789abcdef").hash("alice")
    assert not (tmp_path / "user_hash.key").exists()


def test_key_readable_by_others_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = _settings(tmp_path)
    open_hasher(settings)
    (tmp_path / "user_hash.key").chmod(0o644)
    with caplog.at_level(logging.WARNING):
        open_hasher(settings)
    assert "chmod 600" in caplog.text


def test_unusable_key_file_is_explained(tmp_path: Path) -> None:
    (tmp_path / "user_hash.key").mkdir()
    with pytest.raises(InvalidInputError, match=r"cannot be read or made.*SCION_PRIVACY__HASH_KEY"):
        open_hasher(_settings(tmp_path))
