"""Settings: where a value comes from, what is refused, and that the message helps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from scion_adapters.errors import InvalidInputError
from scion_adapters.settings import Settings, load_settings


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SCION_CONFIG", raising=False)


def write(directory: Path, text: str) -> Path:
    file = directory / "scion.toml"
    file.write_text(text)
    return file


def test_the_file_the_environment_and_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path, '[server]\nport = 1\nhost = "file"\nmax_loras = 2\n')
    monkeypatch.setenv("SCION_SERVER__PORT", "2")
    monkeypatch.setenv("SCION_SERVER__MAX_LORAS", "3")
    settings = load_settings(file, overrides={"server": {"max_loras": 5}})
    assert (settings.server.host, settings.server.port, settings.server.max_loras) == ("file", 2, 5)
    assert settings.server.max_cpu_loras == 12  # the default


def test_the_environment_reaches_nested_sections_and_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path, "[trainer.kto]\nbeta = 0.5\n")
    monkeypatch.setenv("SCION_CONFIG", str(file))
    monkeypatch.setenv("SCION_TRAINER__KTO__EPOCHS", "2")
    monkeypatch.setenv("SCION_SERVER__TARGET_MODULES", '["q_proj"]')
    settings = load_settings()
    assert (settings.trainer.kto.beta, settings.trainer.kto.epochs) == (0.5, 2.0)
    assert settings.server.target_modules == ("q_proj",)


def test_without_a_file_the_defaults_hold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = load_settings()
    assert list(settings.adapters) == ["chat"]
    assert settings.home == tmp_path


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")
    (tmp_path / "models/base").mkdir(parents=True)
    settings = load_settings(write(tmp_path, '[base]\nmodel = "models/base"\n'))
    assert settings.base_path == tmp_path / "models/base"
    assert settings.database_url == f"sqlite:///{tmp_path}/scion.db"


# database.url, and what it becomes in the folder /home
URLS = [
    ("sqlite:///scion.db", "sqlite:///{home}/scion.db"),  # relative to the file
    ("sqlite:////var/lib/scion.db", "sqlite:////var/lib/scion.db"),  # absolute
    ("postgresql+psycopg://u:p@host/db", "postgresql+psycopg://u:p@host/db"),  # no file at all
]


@pytest.mark.parametrize(("url", "expected"), URLS)
def test_database_urls(tmp_path: Path, url: str, expected: str) -> None:
    settings = load_settings(write(tmp_path, f'[database]\nurl = "{url}"\n'))
    assert settings.database_url == expected.format(home=tmp_path)


# the file, the field that is named, pieces of the message
REFUSED = [
    ("[serverr]\nport = 1\n", "serverr", ["remove it", "scion init --print"]),  # a section that does not exist
    ("[server]\nprot = 1\n", "server.prot", ["remove it"]),  # a key that does not exist
    ("[trainer.kto]\nlr = 1\n", "trainer.kto.lr", ["remove it"]),  # the same, nested
    ("[adapters.chat]\nalias = 1\n", "adapters.chat.alias", ["remove it"]),  # the same, in an adapter
    ("[server]\nport = 70000\n", "server.port", ["65535", "70000", "correct it"]),  # out of range
    ('[server]\nport = "eighty"\n', "server.port", ["integer", "eighty"]),  # another type
    ("[server]\nmax_lora_rank = 12\n", "server.max_lora_rank", ["16", "12"]),  # vLLM knows only some ranks
    ('[base]\nquantization = "int3"\n', "base.quantization", ["nf4", "int3"]),  # an unknown choice
    ("[adapters.Chat]\n", "adapters", ["Chat", "a-z"]),  # a name that is no model name
    ("[server\nport = 1\n", None, ["scion.toml"]),  # not TOML
    ("[server]\nport = 1\nport = 2\n", None, ["scion.toml"]),  # twice
]


@pytest.mark.parametrize(("text", "field", "pieces"), REFUSED)
def test_what_is_refused_names_the_key_and_the_remedy(
    tmp_path: Path, text: str, field: str | None, pieces: list[str]
) -> None:
    with pytest.raises(InvalidInputError) as caught:
        load_settings(write(tmp_path, text))
    assert caught.value.field == field
    for piece in (*pieces, "scion.toml"):
        assert piece in str(caught.value)


@pytest.mark.parametrize("name", ["SCION_SERVER__PROT", "SCION_SERVRE__PORT"])
def test_a_misspelt_environment_variable_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "1")
    with pytest.raises(InvalidInputError, match=r"prot|SCION_SERVRE__PORT"):
        load_settings(write(tmp_path, ""))


def test_a_file_that_was_named_must_exist(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="scion init"):
        load_settings(tmp_path / "nowhere.toml")


def fields(section: type[BaseModel], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from fields(inner, f"{path}{name}.")
        elif not path and name == "adapters":
            yield from fields(inner.__args__[1], "adapters.NAME.")  # type: ignore[union-attr]
        else:
            yield f"{path}{name}", field


def test_every_field_has_a_description() -> None:
    missing = [name for name, field in fields(Settings) if not field.description]
    assert missing == []
    assert len(list(fields(Settings))) > 60  # the walk above found them
