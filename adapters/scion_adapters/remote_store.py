"""Moving directories to and from a remote store through fsspec (s3://, gs://…). Knows nothing of what they hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from scion_adapters.errors import InvalidInputError, NotFoundError, ScionError, UnavailableError


class RemoteStore:
    """A prefix of a remote file system. Object stores cannot rename, so the file named `last` marks completeness."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._connection: tuple[Any, str] | None = None

    def upload(self, directory: Path, key: str, *, last: str | None = None) -> None:
        """Copy the files of `directory` to `key`. With `last`, nothing happens if that file is there already."""
        with self._driver("write to") as (filesystem, root):
            target = f"{root}/{key}"
            if last is not None and filesystem.exists(f"{target}/{last}"):
                return
            filesystem.makedirs(target, exist_ok=True)
            for file in sorted(directory.iterdir(), key=lambda file: (file.name == last, file.name)):
                filesystem.put_file(str(file), f"{target}/{file.name}")

    def download(self, key: str, directory: Path) -> None:
        """Copy the files of `key` into `directory`, which exists. Raises NotFoundError if there are none."""
        with self._driver("read") as (filesystem, root):
            source = f"{root}/{key}"
            try:
                entries = filesystem.ls(source, detail=True)
            except FileNotFoundError:
                entries = []
            names = [str(entry["name"]) for entry in entries if entry["type"] == "file"]
            if not names:
                raise NotFoundError(f"{self.url}/{key} does not exist: was it removed, or is store.url another one?")
            for name in names:
                filesystem.get_file(name, str(directory / name.rpartition("/")[2]))

    def remove(self, key: str, *, first: str) -> None:
        """Delete `key`, the file named `first` before the others: without it what is left counts as incomplete."""
        with self._driver("write to") as (filesystem, root):
            target = f"{root}/{key}"
            if filesystem.exists(f"{target}/{first}"):
                filesystem.rm_file(f"{target}/{first}")
            if filesystem.exists(target):
                filesystem.rm(target, recursive=True)

    @contextmanager
    def _driver(self, action: str) -> Iterator[tuple[Any, str]]:
        """The file system and its root. Every protocol's driver has exceptions of its own; here they become ours."""
        try:
            if self._connection is None:
                from fsspec.core import url_to_fs  # slow to import, and only needed for remote stores

                filesystem, root = url_to_fs(self.url)
                self._connection = (filesystem, root.rstrip("/"))
            yield self._connection
        except ScionError:
            raise
        except (ImportError, ValueError) as error:
            raise InvalidInputError(
                f"store.url {self.url!r}: {error}; for s3:// install vllm-scion[s3]", field="store.url"
            ) from error
        except Exception as error:
            raise UnavailableError(
                f"cannot {action} the store {self.url}: {error}; check the address and credentials"
            ) from error
