"""`/v1/adapters`: what adapters and versions there are, and `POST …/versions`, which adds one.

HTTP in, registry calls in a thread, OpenAI-shaped errors out. An upload goes to a temporary directory on the store's
disk, which is removed whatever happens; what is a version and what is refused is decided in scion_adapters.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

from scion_adapters.adapter_files import CONFIG_FILE, SCION_FILE, WEIGHTS_FILE
from scion_adapters.errors import InvalidInputError, RejectedError, ScionError, UnavailableError
from scion_adapters.listing import adapter_json, adapters_json, version_json
from scion_adapters.records import BASE_NUMBER, Version, parse_version_ref
from scion_adapters.registry import Registry, limits_of
from vllm_scion.errors_http import error_response, scion_error
from vllm_scion.runtime import Runtime
from vllm_scion.uploads import Form, boundary_of, receive, too_large

logger = logging.getLogger("vllm_scion")

MAX_UPLOADS = 4
"""At once, in one server process: each may take store.max_upload_mib of disk twice, before and after its check."""

_FILE = {"type": "string", "format": "binary"}
_TEXT = {"type": "string"}
_FORM_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": [CONFIG_FILE, WEIGHTS_FILE],
    "additionalProperties": False,
    "properties": {
        **dict.fromkeys((CONFIG_FILE, WEIGHTS_FILE, SCION_FILE), _FILE),
        "parent": {"type": "integer", "default": BASE_NUMBER, "description": "The version it was trained from."},
        "reason": {**_TEXT, "description": "Why; kept with the event."},
        "digest": {**_TEXT, "description": "What the digest of the version must be."},
    },
}
_FORM_DOCS = {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM_SCHEMA}}}}


def attach_adapters(app: FastAPI, running: Callable[[], Runtime]) -> None:
    """Add the routes under /v1/adapters."""
    under_way: set[Request] = set()

    async def read(request: Request, look: Callable[[Registry], Any]) -> JSONResponse:
        runtime = running()
        try:
            return JSONResponse(await runtime.in_thread(lambda: look(runtime.registry)))
        except ScionError as error:
            return scion_error(error)
        except Exception:
            logger.exception("%s %s", request.method, request.url.path)
            return error_response(500, "the adapters could not be read", kind="server_error")

    @app.get("/v1/adapters", tags=["adapters"], summary="All adapters with what they serve")
    async def list_adapters(raw_request: Request) -> JSONResponse:
        return await read(raw_request, lambda registry: _list(adapters_json(registry)))

    @app.get("/v1/adapters/{name}", tags=["adapters"], summary="An adapter with its versions and aliases")
    async def show_adapter(name: str, raw_request: Request) -> JSONResponse:
        return await read(raw_request, lambda registry: adapter_json(registry, name))

    @app.get("/v1/adapters/{name}/versions", tags=["adapters"], summary="The versions of an adapter")
    async def list_versions(name: str, raw_request: Request) -> JSONResponse:
        return await read(raw_request, lambda registry: _list(adapter_json(registry, name)["versions"]))

    @app.get("/v1/adapters/{name}/versions/{number}", tags=["adapters"], summary="All that is known of a version")
    async def show_version(name: str, number: str, raw_request: Request) -> JSONResponse:
        def look(registry: Registry) -> dict[str, Any]:
            return _version(registry, registry.version(parse_version_ref(f"{name}:{number}")))

        return await read(raw_request, look)

    @app.post("/v1/adapters/{name:path}/versions", tags=["adapters"], summary="Add a version", openapi_extra=_FORM_DOCS)
    async def add_version(name: str, raw_request: Request) -> JSONResponse:
        runtime = running()
        try:
            if len(under_way) >= MAX_UPLOADS:
                raise UnavailableError(f"{MAX_UPLOADS} uploads are under way: try again when one has ended")
            under_way.add(raw_request)
            body = await _publish(runtime, name, raw_request)
        except RejectedError as error:
            if error.reason == "too_large":
                return error_response(413, str(error), code=error.reason)
            return scion_error(error)
        except ScionError as error:
            return scion_error(error)
        except ClientDisconnect:
            logger.info("an upload for %a broke off", name[:80])
            return error_response(400, "the upload broke off")  # nobody reads it
        except Exception:  # a driver's surprise: in OpenAI's shape, and what was received is gone
            logger.exception("%s %s", raw_request.method, raw_request.url.path)
            return error_response(500, "the upload could not be handled", kind="server_error")
        finally:
            under_way.discard(raw_request)
        return JSONResponse(body, status_code=201)


async def _publish(runtime: Runtime, name: str, request: Request) -> dict[str, Any]:
    """Receive, check and publish; returns what there is to say of the new version."""
    registry, in_thread = runtime.registry, runtime.in_upload_thread
    actor = getattr(request.state, "scion_actor", "http")
    try:
        registry.check_publishable(name)
        max_bytes = runtime.settings.store.max_upload_mib << 20
        claimed = request.headers.get("content-length", "")
        if claimed.isdecimal() and int(claimed) > max_bytes:
            raise too_large(max_bytes)
        boundary = boundary_of(request.headers.get("content-type"))
        form = Form(await in_thread(registry.store.new_temporary), boundary)
    except RejectedError as error:
        await in_thread(partial(registry.record_refusal, name, error, actor=actor))
        raise
    try:
        try:
            fields = await receive(request.stream(), form, in_thread, max_bytes=max_bytes)
        except RejectedError as error:
            await in_thread(partial(registry.record_refusal, name, error, actor=actor))
            raise
        parent = _number(fields.get("parent", str(BASE_NUMBER)))

        def publish() -> dict[str, Any]:
            version = registry.publish(
                name,
                form.directory,
                parent=parent,
                base=runtime.base,
                limits=limits_of(runtime.settings),
                actor=actor,
                reason=fields.get("reason", "uploaded"),
                recipe="import",
                digest=fields.get("digest"),
            )
            return _version(registry, version)

        return await in_thread(publish)
    finally:
        await asyncio.shield(asyncio.to_thread(form.discard))  # our own threads may be gone when the server stops


def _version(registry: Registry, version: Version) -> dict[str, Any]:
    shown = version_json(registry, version)
    return {"object": "adapter.version", **shown, "report": [Path(file).name for file in shown["report"]]}


def _list(data: list[dict[str, Any]]) -> dict[str, Any]:
    return {"object": "list", "data": data, "has_more": False}


def _number(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise InvalidInputError(
            f"parent is {text[:80]!a}: expected the number of a version; 0 is the base", field="parent"
        )
    return int(text)
