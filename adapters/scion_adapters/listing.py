"""What is known of adapters and versions, as JSON: one shape for `scion adapters … --json` and `GET /v1/adapters…`."""

from __future__ import annotations

import dataclasses
from typing import Any

from scion_adapters.records import Version
from scion_adapters.registry import Registry


def adapters_json(registry: Registry) -> list[dict[str, Any]]:
    """Every adapter with what it serves."""
    return [
        {"adapter": name, "num_versions": len(registry.versions(name)), "aliases": registry.aliases(name)}
        for name in registry.adapters()
    ]


def adapter_json(registry: Registry, name: str) -> dict[str, Any]:
    """One adapter with its versions, aliases and their history. Raises NotFoundError."""
    return {
        "adapter": name,
        "versions": [public_json(version) for version in registry.versions(name)],
        "aliases": registry.aliases(name),
        "history": [dataclasses.asdict(change) for change in registry.alias_history(name)],
    }


def version_json(registry: Registry, version: Version) -> dict[str, Any]:
    """All that is known of a version; `report` are the files of its report on this host."""
    return {
        **public_json(version),
        "aliases": [alias for alias, number in registry.aliases(version.adapter).items() if number == version.number],
        "report": [str(file) for file in registry.store.report_files(version.ref)],
    }


def public_json(version: Version) -> dict[str, Any]:
    """The version for people: its evaluation key is the gates' secret."""
    data = {"version": str(version.ref), **dataclasses.asdict(version)}
    del data["evaluation_key"]
    return data
