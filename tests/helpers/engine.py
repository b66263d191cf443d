"""Hand-written fakes of what the plugin needs of vLLM's engine and of the artifact store."""

from __future__ import annotations

import asyncio
from pathlib import Path

from scion_adapters.errors import RejectedError


class FakeTable:
    """vLLM's side: what is loaded, under which key; `fail` names LoRA ids that it refuses."""

    def __init__(self) -> None:
        self.keys: dict[str, int] = {}
        self.forgotten: set[int] = set()
        self.calls: list[str] = []
        self.fail: set[int] = set()
        self.hold: asyncio.Event | None = None

    async def load(self, *, key: str, lora_name: str, lora_id: int, path: str) -> None:
        if self.hold is not None:
            await self.hold.wait()
        if lora_id in self.fail:
            raise RuntimeError("the engine says no")
        self.calls.append(f"load {lora_name} {lora_id} {path}")
        self.keys[key] = lora_id

    def forget(self, *, key: str) -> None:
        self.forgotten.add(self.keys.pop(key))

    async def remove(self, *, lora_id: int) -> None:
        assert lora_id in self.forgotten, "requests could still find it"
        self.forgotten.discard(lora_id)
        self.calls.append(f"unload {lora_id}")


class FakeStore:
    def __init__(self) -> None:
        self.bad: set[str] = set()

    def verify(self, digest: str) -> None:
        if digest in self.bad:
            raise RejectedError(f"{digest} was altered", reason="digest_mismatch")

    def path(self, digest: str) -> Path:
        return Path("/store") / digest.removeprefix("sha256:")
