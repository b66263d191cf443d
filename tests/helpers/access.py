"""Requests with and without a key, and what the server logs meanwhile."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

CHAT: dict[str, Any] = {"model": "chat", "messages": [{"role": "user", "content": "Hello"}]}


def bearer(plain: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {plain}"}


async def status(client: httpx.AsyncClient, path: str, plain: str | None = None) -> int:
    """The status of a question to the model, or of a GET of any other path."""
    headers = bearer(plain) if plain else {}
    if path.endswith("completions"):
        return (await client.post(path, json=CHAT, headers=headers)).status_code
    return (await client.get(path, headers=headers)).status_code


@contextmanager
def server_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What a server logs that is started inside: our loggers take over the handlers of vLLM's."""
    vllm = logging.getLogger("vllm")
    before = vllm.level
    vllm.addHandler(caplog.handler)
    vllm.setLevel(logging.DEBUG)
    caplog.set_level(logging.DEBUG)
    try:
        yield caplog
    finally:
        vllm.setLevel(before)
        vllm.removeHandler(caplog.handler)
