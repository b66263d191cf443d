"""Taking a multipart body apart into a directory of ours, as it comes: bounded in size and time, off the event loop.

The form's parts have fixed names, each at most once, which bounds their number too; what a client calls its own files
is never used as a path. Knows nothing of registries: what the files hold is checked later, by scion_adapters.preflight.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from scion_adapters.adapter_files import belongs
from scion_adapters.errors import InvalidInputError, RejectedError, ScionError
from scion_adapters.files import remove_tree, writing_to

FIELDS = ("parent", "reason", "digest")
MAX_FIELD_BYTES = 4096
MAX_BOUNDARY_BYTES = 70  # RFC 2046, 5.1.1
IDLE_S = 60.0
"""A client that sends nothing for so long has gone, without its network saying so."""
_WRITE_BYTES = 1 << 20


InThread = Callable[[Callable[[], Any]], Awaitable[Any]]


def boundary_of(content_type: str | None) -> bytes:
    """The boundary that the header names, or InvalidInputError when the body is not a form."""
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary or len(boundary) > MAX_BOUNDARY_BYTES:
        raise InvalidInputError(
            f"Content-Type is {(content_type or '')[:80]!a}: expected multipart/form-data, as `curl -F` sends it",
            field="Content-Type",
        )
    return boundary


class Form:
    """Writes the files of a form into `directory`, which is its own from then on, and keeps its `fields`.

    To be called in threads, one call after the other.
    """

    def __init__(self, directory: Path, boundary: bytes) -> None:
        self.directory = directory
        self.fields: dict[str, str] = {}
        self._names: set[str] = set()
        self._headers: dict[str, str] = {}
        self._header = (bytearray(), bytearray())  # name and value of the one that is being read
        self._name = ""
        self._value: bytearray | None = None  # of a field
        self._file: BinaryIO | None = None  # of a file that is kept
        self._is_complete = self._is_closed = False
        self._lock = threading.Lock()  # a request that is cancelled closes while a thread still writes
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._headers.clear,
                "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_part_data": self._on_part_data,
                "on_part_end": self._on_part_end,
                "on_end": self._on_end,
            },
        )

    def write(self, data: bytes) -> None:
        """Take the next piece of the body. Raises InvalidInputError, RejectedError, UnavailableError."""
        with self._lock, writing_to(self.directory):
            if self._is_closed:
                return
            try:
                self._parser.write(data)
            except FormParserError as error:
                raise InvalidInputError(f"the body is not a well-formed multipart/form-data: {error}") from error

    def finish(self) -> dict[str, str]:
        """The fields, or InvalidInputError if the form is not complete. Nothing is written any more."""
        self.close()
        if not self._is_complete:
            raise InvalidInputError("the body ended before the form did: send it again")
        return self.fields

    def close(self) -> None:
        """Write nothing any more."""
        with self._lock:
            self._is_closed = True
            if self._file is not None:
                self._file.close()

    def discard(self) -> None:
        """Remove what was received."""
        self.close()
        remove_tree(self.directory)

    def _on_header_end(self) -> None:
        name, value = (bytes(part).decode("latin-1") for part in self._header)
        self._headers[name.lower()] = value
        for part in self._header:
            part.clear()

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get("content-disposition"))
        if b"name" not in options:
            raise InvalidInputError("a part of the form has no name: expected Content-Disposition: form-data; name=…")
        name, filename = (options.get(key, b"").decode(errors="backslashreplace") for key in (b"name", b"filename"))
        for text in (name, filename):
            if "/" in text or "\\" in text or text in (".", ".."):
                raise RejectedError(
                    f"{text[:120]!a} is a path: expected the name of a file, without its folder", reason="path_in_name"
                )
        if name in self._names:
            raise RejectedError(f"the form has two parts named {name[:120]!a}", reason="duplicate_part")
        if name in FIELDS:
            self._value = bytearray()
        elif belongs(name):
            self._file = (self.directory / name).open("xb")
        self._name = name
        self._names.add(name)

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._file is not None:
            self._file.write(memoryview(data)[start:end])
        elif self._value is not None:
            self._value += data[start:end]
            if len(self._value) > MAX_FIELD_BYTES:
                raise InvalidInputError(f"{self._name} is longer than {MAX_FIELD_BYTES} bytes", field=self._name)

    def _on_part_end(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._value is not None:
            try:
                self.fields[self._name] = self._value.decode()
            except UnicodeDecodeError as error:
                raise InvalidInputError(f"{self._name} is not UTF-8 text", field=self._name) from error
        self._file = self._value = None

    def _on_end(self) -> None:
        self._is_complete = True


async def receive(body: AsyncIterator[bytes], form: Form, in_thread: InThread, *, max_bytes: int) -> dict[str, str]:
    """Write `body` into `form` and return its fields.

    A form that is refused is read to its end all the same (within the limits), because clients that are still sending
    do not look for an answer. Raises what `Form` raises, and RejectedError(reason="too_large").
    """
    refusal: ScionError | None = None
    size_bytes = 0
    pieces = bytearray()
    while chunk := await _next(body):
        size_bytes += len(chunk)
        if size_bytes > max_bytes:
            raise too_large(max_bytes)
        if refusal is not None:
            continue
        pieces += chunk
        if len(pieces) >= _WRITE_BYTES:
            refusal = await in_thread(partial(_refused, form.write, bytes(pieces)))
            pieces.clear()
    if refusal is None and pieces:
        refusal = await in_thread(partial(_refused, form.write, bytes(pieces)))
    if refusal is not None:
        raise refusal
    fields: dict[str, str] = await in_thread(form.finish)
    return fields


def too_large(max_bytes: int) -> RejectedError:
    """The refusal of a body above the limit."""
    return RejectedError(
        f"the upload is larger than {max_bytes >> 20} MiB: raise store.max_upload_mib, or copy the files to the server "
        "and use `scion adapters import`",
        reason="too_large",
    )


async def _next(body: AsyncIterator[bytes]) -> bytes | None:
    """The next piece that is not empty; None at the end."""
    try:
        async with asyncio.timeout(IDLE_S):
            async for chunk in body:
                if chunk:
                    return chunk
    except TimeoutError as error:
        raise InvalidInputError(f"nothing came for {IDLE_S:g} s: send the upload again") from error
    return None


def _refused(write: Callable[[bytes], None], data: bytes) -> ScionError | None:
    try:
        write(data)
    except ScionError as error:
        return error
    return None
