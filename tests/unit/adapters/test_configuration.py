"""The generated scion.toml: it loads, it is complete, and what it shows as defaults are the defaults."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import BaseModel

from scion_adapters.configuration import render_configuration
from scion_adapters.settings import Settings, load_settings

_SHOWN = re.compile(r"^# ([a-z_]+) =( .+)?$", re.MULTILINE)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SCION_CONFIG", raising=False)


def load(directory: Path, text: str) -> Settings:
    file = directory / "scion.toml"
    file.write_text(text)
    return load_settings(file)


def test_it_loads_as_it_is(tmp_path: Path) -> None:
    settings = load(tmp_path, render_configuration({"base": {"model": "my/base"}}, adapters=("chat", "code")))
    assert settings.base.model == "my/base"
    assert sorted(settings.adapters) == ["chat", "code"]


def test_uncommented_it_gives_the_defaults(tmp_path: Path) -> None:
    text = _SHOWN.sub(lambda m: f"{m[1]} ={m[2]}" if m[2] else "", render_configuration())
    assert load(tmp_path, text).model_dump() == load(tmp_path, "").model_dump()
    assert tomllib.loads(text)["trainer"]["kto"]["batch_size"] == 16  # it was uncommented


def paths(section: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from paths(inner, f"{prefix}.{name}".lstrip("."))
        elif name not in ("home", "adapters"):
            yield f"{prefix}.{name}"


def test_every_field_appears_in_its_section_under_its_description() -> None:
    text = render_configuration()
    sections = {block.partition("]")[0]: block for block in re.split(r"^\[", text, flags=re.MULTILINE)[1:]}
    for path in paths(Settings, ""):
        section, _, name = path.rpartition(".")
        assert re.search(rf"^# .+\n(# )?{name} =", sections[section], re.MULTILINE), path
    assert "schedule" in sections["adapters.chat"]


def test_choices_and_bounds_are_shown() -> None:
    text = render_configuration()
    assert 'One of: "nf4", "none".' in text
    assert "(at least 0, at most 65535)" in text


@pytest.mark.parametrize("value", ['C:\\base "x"', "ünïcode", "a\nb"])
def test_awkward_values_survive(tmp_path: Path, value: str) -> None:
    assert load(tmp_path, render_configuration({"base": {"model": value}})).base.model == value
