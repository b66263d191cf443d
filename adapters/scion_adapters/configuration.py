"""The commented `scion.toml`, written out of the settings' own descriptions, so that there is one source for both."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from scion_adapters.settings import Settings

_HEADER = """\
# Configuration of scion. Lines that begin with "# name =" show a default: remove the "# " to change it.
# Every value can also be given as an environment variable, e.g. SCION_SERVER__PORT=8001 for `port` in [server].
# Relative paths are relative to the folder of this file.
"""
_ADAPTERS = """\
# One section per adapter (a named line of versions, and the model name that clients ask for).
"""


def render_configuration(
    values: Mapping[str, Mapping[str, Any]] | None = None, *, adapters: tuple[str, ...] = ("chat",)
) -> str:
    """The complete configuration: `values` by section and key written active, all else as commented defaults."""
    blocks = [_HEADER]
    for name, field in Settings.model_fields.items():
        section = _section_of(field)
        if section is not None:
            blocks.extend(_sections(name, section, values or {}))
    adapter_section = typing.get_args(Settings.model_fields["adapters"].annotation)[1]
    for adapter in adapters:
        blocks.append(_ADAPTERS + "\n".join(_sections(f"adapters.{adapter}", adapter_section, {})))
    return "\n".join(blocks)


def _sections(name: str, section: type[BaseModel], values: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The section's block, then those of the sections in it."""
    active = values.get(name, {})
    lines = [f"# {section.__doc__}", f"[{name}]"]
    nested: list[tuple[str, type[BaseModel]]] = []
    for key, field in section.model_fields.items():
        inner = _section_of(field)
        if inner is not None:
            nested.append((f"{name}.{key}", inner))
            continue
        lines += ["", f"# {field.description}{_expectation(field)}"]
        if key in active:
            lines.append(f"{key} = {_toml(active[key])}")
        elif field.default is None:
            lines.append(f"# {key} =")
        else:
            lines.append(f"# {key} = {_toml(field.default)}")
    yield "\n".join(lines) + "\n"
    for inner_name, inner in nested:
        yield from _sections(inner_name, inner, values)


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    annotation = field.annotation
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _expectation(field: FieldInfo) -> str:
    """What the type adds to the description: the choices, or the bounds."""
    for annotation in (field.annotation, *_members(field.annotation)):
        if typing.get_origin(annotation) is Literal:
            return f" One of: {', '.join(json.dumps(choice) for choice in typing.get_args(annotation))}."
    words = {Ge: "at least", Gt: "more than", Le: "at most", Lt: "less than"}
    bounds = []
    for item in field.metadata:
        for kind, word in words.items():
            if isinstance(item, kind):
                bounds.append(f"{word} {getattr(item, kind.__name__.lower())}")
    return f" ({', '.join(bounds)})" if bounds else ""


def _members(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation) if typing.get_origin(annotation) in (typing.Union, types.UnionType) else ()


def _toml(value: Any) -> str:
    """`value` in TOML; JSON is the same for what settings hold (strings, numbers, booleans, lists of them)."""
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return json.dumps(value)
