"""The artifact store: whatever happens while publishing, a digest's directory is complete or absent."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from scion_adapters.artifacts import ArtifactStore, open_store
from scion_adapters.errors import InvalidInputError, NotFoundError, RejectedError, UnavailableError
from scion_adapters.fingerprint import BaseInfo, read_base
from scion_adapters.records import VersionRef
from scion_adapters.remote_store import RemoteStore
from scion_adapters.settings import load_settings
from tests.helpers.adapters import make_adapter, make_base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> BaseInfo:
    return read_base(make_base(tmp_path_factory.mktemp("artifacts") / "base"))


@pytest.fixture
def source(tmp_path: Path, base: BaseInfo) -> Path:
    return make_adapter(tmp_path / "source", base, scion={"base_fingerprint": base.fingerprint})


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store")


def published(store: ArtifactStore) -> list[str]:
    return sorted(path.name for path in store.root.glob("versions/*"))


def test_what_was_added_is_there_and_intact(store: ArtifactStore, source: Path) -> None:
    artifact = store.add(source)
    directory = store.path(artifact.digest)
    assert directory.name == artifact.digest.removeprefix("sha256:")
    assert artifact.size_bytes == sum(file.stat().st_size for file in source.iterdir())
    for file in source.iterdir():
        assert (directory / file.name).read_bytes() == file.read_bytes()
    assert sorted(json.loads((directory / "manifest.json").read_text())["files"]) == [
        f.name for f in sorted(source.iterdir())
    ]
    store.verify(artifact.digest)
    assert not list((store.root / "tmp").iterdir())


def test_the_digest_is_of_names_and_bytes_alone(store: ArtifactStore, source: Path, tmp_path: Path) -> None:
    first = store.add(source)
    copy = tmp_path / "under-another-name"
    shutil.copytree(source, copy)
    (copy / "README.md").write_text("is left out")
    os.utime(copy / "adapter_config.json", (1, 1))
    assert store.add(copy) == first
    assert published(store) == [first.digest.removeprefix("sha256:")]
    with (copy / "adapter_config.json").open("a") as file:
        file.write(" ")
    assert store.add(copy).digest != first.digest
    (copy / "scion.json").unlink()
    assert len({store.add(copy).digest, store.add(source).digest}) == 2


@pytest.mark.parametrize("step", range(12))
@pytest.mark.parametrize("call", ["fsync", "rename", "open"])
def test_a_failure_at_any_step_publishes_nothing_half(
    store: ArtifactStore, source: Path, monkeypatch: pytest.MonkeyPatch, call: str, step: int
) -> None:
    real: Callable[..., Any] = getattr(os, call)
    count = 0

    def failing(*arguments: Any, **keywords: Any) -> Any:
        nonlocal count
        count += 1
        if count == step + 1:
            raise OSError(28, "no space left on device")
        return real(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        try:
            digest = store.add(source).digest
        except (OSError, UnavailableError):
            digest = None
    for name in published(store):
        store.verify(f"sha256:{name}")  # what is there is whole
    assert not list((store.root / "tmp").iterdir())
    assert digest is None or published(store)
    artifact = store.add(source)  # and the next attempt succeeds
    store.verify(artifact.digest)


def test_a_kill_at_any_step_publishes_nothing_half(tmp_path: Path, source: Path) -> None:
    program = textwrap.dedent(
        """
        import os, signal, sys
        from pathlib import Path
        from scion_adapters.artifacts import ArtifactStore

        left = int(sys.argv[3])

        def dying(real):
            def call(*arguments, **keywords):
                global left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments, **keywords)
            return call

        os.fsync, os.rename = dying(os.fsync), dying(os.rename)
        ArtifactStore(Path(sys.argv[1])).add(Path(sys.argv[2]))
        """
    )
    # Three files, the manifest and the directory are flushed, then renamed: kill before the first and before the last.
    outcomes = []
    for calls in (0, 5, 50):
        root = tmp_path / f"store-{calls}"
        command = [sys.executable, "-c", program, str(root), str(source), str(calls)]
        outcomes.append((subprocess.run(command, check=False, timeout=60).returncode, published(ArtifactStore(root))))
    assert [(code, len(names)) for code, names in outcomes] == [(-9, 0), (-9, 0), (0, 1)]


def test_left_overs_of_killed_processes_are_swept(store: ArtifactStore, source: Path) -> None:
    old, young = store.root / "tmp/old", store.root / "tmp/young"
    for directory in (old, young):
        directory.mkdir(parents=True)
        (directory / "half").touch()
    os.utime(old, (1, 1))
    store.add(source)
    assert (old.exists(), young.exists()) == (False, True)  # the young one may be another process at work


def test_several_at_once_publish_one(store: ArtifactStore, source: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = {artifact.digest for artifact in pool.map(lambda _: store.add(source), range(8))}
    assert len(found) == 1
    store.verify(found.pop())


def test_changed_bytes_are_noticed_and_healed(store: ArtifactStore, source: Path) -> None:
    digest = store.add(source).digest
    weights = store.path(digest) / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(RejectedError, match="publish again") as caught:
        store.verify(digest)
    assert caught.value.reason == "digest_mismatch"
    store.add(source)
    store.verify(digest)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "manifest.json"])
def test_an_incomplete_directory_is_no_artifact(store: ArtifactStore, source: Path, name: str) -> None:
    digest = store.add(source).digest
    (store.path(digest) / name).unlink()
    with pytest.raises(NotFoundError, match=digest):
        store.path(digest)


@pytest.mark.parametrize(
    "digest",
    [
        "sha256:" + "0" * 64,  # well formed, and not there
        "sha256:../../etc",  # a way out
        "0" * 64,  # without its algorithm
        "",  # nothing
    ],
)
def test_unknown_digests_are_not_found(store: ArtifactStore, digest: str) -> None:
    with pytest.raises(NotFoundError):
        store.path(digest)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_links_are_not_followed(store: ArtifactStore, source: Path, tmp_path: Path, name: str) -> None:
    secret = tmp_path / "secret"
    (source / name).rename(secret)
    (source / name).symlink_to(secret)
    with pytest.raises(RejectedError) as caught:
        store.add(source)
    assert caught.value.reason == "symlink"
    assert published(store) == []


def test_a_staged_copy_that_is_not_committed_is_gone(store: ArtifactStore, source: Path) -> None:
    with store.stage(source) as staged:
        assert (staged.path / "adapter_config.json").is_file()
        (source / "adapter_config.json").write_text("changed meanwhile")
        assert "changed" not in (staged.path / "adapter_config.json").read_text()
    assert not staged.path.exists()
    assert published(store) == []


def test_places_for_reports_snapshots_and_runs(store: ArtifactStore) -> None:
    assert store.report_path(VersionRef("chat", 7)) == store.root / "reports/chat/7"
    for directory in (store.report_path(VersionRef("chat", 7)), store.snapshots_path, store.runs_path):
        (directory / "file").write_text("writable")
    with pytest.raises(InvalidInputError):
        store.report_path(VersionRef("../chat", 7))


# --- remote stores ---


@pytest.fixture
def url() -> str:
    return f"memory://scion-{uuid.uuid4().hex}"  # fsspec keeps one memory for the whole process


def test_a_remote_store_fills_another_hosts_cache(tmp_path: Path, source: Path, url: str) -> None:
    here, there = (
        ArtifactStore(tmp_path / "here", RemoteStore(url)),
        ArtifactStore(tmp_path / "there", RemoteStore(url)),
    )
    digest = here.add(source).digest
    fetched = there.path(digest)
    assert fetched.is_relative_to(tmp_path / "there")
    there.verify(digest)
    assert there.path(digest) == fetched
    assert there.add(source).digest == digest
    with pytest.raises(NotFoundError, match="does not exist"):
        there.path("sha256:" + "0" * 64)


def test_an_upload_that_broke_off_is_no_artifact_and_is_completed(tmp_path: Path, source: Path, url: str) -> None:
    import fsspec

    here, there = (
        ArtifactStore(tmp_path / "here", RemoteStore(url)),
        ArtifactStore(tmp_path / "there", RemoteStore(url)),
    )
    digest = here.add(source).digest
    remote = fsspec.filesystem("memory")
    manifest = f"{url.removeprefix('memory:/')}/versions/{digest.removeprefix('sha256:')}/manifest.json"
    remote.rm(manifest)  # the manifest is uploaded last, so this is how it looks
    with pytest.raises(RejectedError) as caught:
        there.path(digest)
    assert caught.value.reason == "digest_mismatch"
    assert published(there) == []
    here.add(source)
    there.verify(digest)


def test_damaged_remote_bytes_never_reach_the_cache(tmp_path: Path, source: Path, url: str) -> None:
    import fsspec

    here, there = (
        ArtifactStore(tmp_path / "here", RemoteStore(url)),
        ArtifactStore(tmp_path / "there", RemoteStore(url)),
    )
    digest = here.add(source).digest
    name = f"{url.removeprefix('memory:/')}/versions/{digest.removeprefix('sha256:')}/adapter_model.safetensors"
    remote = fsspec.filesystem("memory")
    remote.pipe_file(name, bytes(len(remote.cat_file(name))))
    with pytest.raises(RejectedError):
        there.path(digest)
    assert published(there) == []


def test_reports_are_uploaded(tmp_path: Path, url: str) -> None:
    import fsspec

    store = ArtifactStore(tmp_path / "here", RemoteStore(url))
    (store.report_path(VersionRef("chat", 7)) / "report.json").write_text("{}")
    store.sync_report(VersionRef("chat", 7))
    assert fsspec.filesystem("memory").cat_file(f"{url.removeprefix('memory:/')}/reports/chat/7/report.json") == b"{}"


def test_an_unknown_protocol_says_what_to_install(tmp_path: Path, source: Path) -> None:
    store = ArtifactStore(tmp_path / "here", RemoteStore("nosuch://bucket"))
    with pytest.raises(InvalidInputError, match=r"store\.url"):
        store.add(source)


def test_a_remote_store_that_is_away_is_unavailable(
    tmp_path: Path, source: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("connection refused")

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "exists", refuse)
    with pytest.raises(UnavailableError, match="connection refused"):
        ArtifactStore(tmp_path / "here", RemoteStore(url)).add(source)


# store.url, the folder that holds files on this host
URLS = [
    ("artifacts", "artifacts"),  # relative to the configuration
    ("file://artifacts", "artifacts"),  # the same, as a URL
    ("s3://bucket/prefix", "cache"),  # remote: the cache
]


@pytest.mark.parametrize(("value", "folder"), URLS)
def test_the_configured_store(tmp_path: Path, value: str, folder: str) -> None:
    file = tmp_path / "scion.toml"
    file.write_text(f'[store]\nurl = "{value}"\n')
    assert open_store(load_settings(file)).root == tmp_path / folder
