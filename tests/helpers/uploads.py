"""Uploading adapters to the plugin in vLLM's application: forms, and what they may not leave behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.helpers.adapters import make_adapter
from tests.helpers.plugin_world import PluginWorld

VERSIONS = "/v1/adapters/chat/versions"
BOUNDARY = "----the-boundary"
FORM = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
END = f"--{BOUNDARY}--\r\n"


def parts(world: PluginWorld, *, seed: int = 1, **changes: Any) -> list[tuple[str, tuple[str, bytes]]]:
    """The files of a good adapter, as httpx takes them."""
    directory = make_adapter(world.home / f"upload-{seed}", world.base, seed=seed, **changes)
    return [(file.name, (file.name, file.read_bytes())) for file in sorted(directory.iterdir())]


def part(disposition: str, content: str = "x") -> str:
    """One part of a form, as text."""
    return f"--{BOUNDARY}\r\nContent-Disposition: form-data; {disposition}\r\n\r\n{content}\r\n"


def file_part(name: str, filename: str) -> str:
    return part(f'name="{name}"; filename="{filename}"')


def body(world: PluginWorld, *, seed: int = 1) -> bytes:
    """A complete form with a good adapter."""
    pieces = []
    for name, (filename, content) in parts(world, seed=seed):
        head, tail = file_part(name, filename).encode().split(b"\r\n\r\nx")
        pieces.append(head + b"\r\n\r\n" + content + tail)
    return b"".join(pieces) + END.encode()


def leftovers(world: PluginWorld) -> list[Path]:
    """What lies in the store's folder for what is under way."""
    return list((world.registry.store.root / "tmp").glob("*"))
