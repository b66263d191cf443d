"""`GET /v1/models`, with our names in vLLM's list, and `GET /v1/scion/status`."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import JSONResponse

from scion_adapters.records import BASE_NUMBER, VersionState, is_step_line
from vllm_scion.gateway import Gateway
from vllm_scion.runtime import Runtime
from vllm_scion.serving import Published


def wrap_models(original: Callable[[Request], Any], gateway: Gateway) -> Callable[[Request], Any]:
    """vLLM's list of models with adapter names, aliases and loaded versions in place of its own cards of our LoRAs.

    Its own show a path, and hide the names that can be asked. `root` is the version behind the name now and `parent`
    the base, as vLLM has it for LoRAs.
    """

    @functools.wraps(original)
    async def endpoint(raw_request: Request) -> Any:
        response = await original(raw_request)
        body = json.loads(bytes(response.body))
        published = gateway.serving.published
        cards = [card for card in body["data"] if str(card["id"]).partition(":")[0] not in published.routing.adapters]
        template = cards[0] if cards else {"object": "model", "owned_by": "vllm"}
        names = model_names(published, gateway.base_name)
        body["data"] = cards + [
            {**template, "id": name, "root": root, "parent": gateway.base_name} for name, root in names
        ]
        return JSONResponse(body)

    return endpoint


def model_names(published: Published, base_name: str) -> list[tuple[str, str]]:
    """(name, what answers to it now) for every name that can be asked; candidates under evaluation are hidden."""
    found: list[tuple[str, str]] = []
    for name, line in sorted(published.routing.adapters.items()):
        if is_step_line(name):
            continue
        askable = {
            v.number
            for v in line.versions.values()
            if v.lora_id in published.resident and v.state is VersionState.ACCEPTED
        }

        def root(number: int, name: str = name) -> str:
            return base_name if number == BASE_NUMBER else f"{name}:{number}"

        found.append((name, root(line.champion)))
        aliases = {"champion": line.champion, **line.aliases}
        found += [
            (f"{name}@{alias}", root(number))
            for alias, number in sorted(aliases.items())
            if number == BASE_NUMBER or number in askable
        ]
        found += [(f"{name}:{number}", root(number)) for number in sorted(askable)]
    return found


def attach_status(app: FastAPI, running: Callable[[], Runtime]) -> None:
    """Add `GET /v1/scion/status`: what this server process serves and what waits."""

    @app.get("/v1/scion/status", summary="What this server process serves", tags=["scion"])
    async def status() -> JSONResponse:
        return JSONResponse(running().status())
