"""A gate's world without a server or files: a context whose every part can be replaced."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from scion_adapters.fingerprint import BaseInfo
from scion_adapters.records import Version, VersionState
from scion_adapters.settings import Settings
from scion_feedback.selection import SnapshotRow
from scion_trainer.chat_tokens import ChatTokens
from scion_trainer.gates.types import GateContext, Models, RetentionItem
from scion_trainer.server_client import ModelServer
from tests.helpers.fake_server import FakeServer, FakeTokenizer, Persona
from tests.helpers.training import snapshot_row

BASE = BaseInfo("sha256:base", {}, 320, 2)
VERSION = Version(
    adapter="chat",
    number=8,
    lora_id=8,
    digest="sha256:0",
    state=VersionState.CANDIDATE,
    parent=7,
    base_fingerprint=BASE.fingerprint,
    rank=4,
    size_bytes=1,
    evaluation_key="key",
    created_at=0.0,
    created_by="test",
)
MODELS = Models(candidate="chat:8", parent="chat:7", base="base")


def gate_context(
    personas: dict[str, Persona] | None = None,
    *,
    server: ModelServer | None = None,
    rows: Sequence[SnapshotRow] = (),
    retention: Sequence[RetentionItem] = (),
    gates: dict[str, Any] | None = None,
    **changes: Any,
) -> GateContext:
    """`personas` by model name; those that are missing behave alike."""
    known = {name: Persona() for name in ("base", "chat:7", "chat:8")} | (personas or {})
    context = GateContext(
        settings=Settings.model_validate({"gates": gates or {}}),
        version=VERSION,
        artifact=lambda: Path("nowhere"),
        verify_artifact=lambda: None,
        base_info=BASE,
        models=MODELS,
        server=server or FakeServer(known),
        tokens=ChatTokens(FakeTokenizer()),
        rows=rows,
        retention=retention,
    )
    return replace(context, **changes)


def question(text: str, **changes: Any) -> SnapshotRow:
    """A held-out row about `text`."""
    messages = [{"role": "user", "content": text}]
    return snapshot_row(split="heldout", messages=messages, feedback_id=f"fb-{text}", **changes)


def known_item(text: str, answer: str = " yes") -> RetentionItem:
    return RetentionItem(({"role": "user", "content": text},), "it is", answer)
