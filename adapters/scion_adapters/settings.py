"""Settings: one `scion.toml`, overridable by `SCION_<SECTION>__<KEY>` environment variables; unknown keys are errors.

Every field carries a description (sections/); `scion init` writes them out as the commented configuration, so there is
one source. Relative paths are relative to the folder of the file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from scion_adapters.errors import InvalidInputError
from scion_adapters.records import check_adapter_name
from scion_adapters.sections.gates import GatesSection
from scion_adapters.sections.serving import (
    BaseSection,
    CaptureSection,
    DatabaseSection,
    PrivacySection,
    RolloutSection,
    ServerSection,
    StoreSection,
)
from scion_adapters.sections.training import AdapterSection, TrainerSection

CONFIG_ENV = "SCION_CONFIG"
DEFAULT_CONFIG = "scion.toml"


class Settings(BaseSettings):
    """All settings. Build it with `load_settings`."""

    model_config = SettingsConfigDict(
        env_prefix="SCION_", env_nested_delimiter="__", extra="forbid", frozen=True, ignored_types=(cached_property,)
    )
    file: ClassVar[Path | None] = None

    home: Path = Field(Path("."), exclude=True, description="Folder that relative paths are relative to.")
    base: BaseSection = Field(default_factory=BaseSection)
    database: DatabaseSection = Field(default_factory=DatabaseSection)
    store: StoreSection = Field(default_factory=StoreSection)
    server: ServerSection = Field(default_factory=ServerSection)
    capture: CaptureSection = Field(default_factory=CaptureSection)
    privacy: PrivacySection = Field(default_factory=PrivacySection)
    rollout: RolloutSection = Field(default_factory=RolloutSection)
    trainer: TrainerSection = Field(default_factory=TrainerSection)
    gates: GatesSection = Field(default_factory=GatesSection)
    adapters: dict[str, AdapterSection] = Field(default_factory=lambda: {"chat": AdapterSection()})

    @field_validator("adapters")
    @classmethod
    def _check_names(cls, value: dict[str, AdapterSection]) -> dict[str, AdapterSection]:
        for name in value:
            check_adapter_name(name)
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        sources: list[PydanticBaseSettingsSource] = [init_settings, env_settings]
        if cls.file is not None:
            sources.append(TomlConfigSettingsSource(settings_cls, cls.file))
        return tuple(sources)

    def path(self, value: str) -> Path:
        """`value` as a path, relative to `home`."""
        return self.home / Path(value).expanduser()

    @cached_property
    def base_path(self) -> Path | None:
        """The base as a local directory, or None when `base.model` is a Hugging Face id."""
        local = self.path(self.base.model)
        return local if local.is_dir() else None

    @cached_property
    def database_url(self) -> str:
        """`database.url` with a relative SQLite path made relative to `home`."""
        prefix = "sqlite:///"
        url = self.database.url
        if url.startswith(prefix) and not url.startswith(prefix + "/") and url != prefix + ":memory:":
            return prefix + str((self.home / url.removeprefix(prefix)).resolve())
        return url


def load_settings(file: str | Path | None = None, *, overrides: Mapping[str, Any] | None = None) -> Settings:
    """Read `file`, else $SCION_CONFIG, else ./scion.toml if it exists, else the defaults; then the environment.

    `overrides` are nested mappings with the highest precedence. Raises InvalidInputError naming the key and the remedy.
    """
    named = file or os.environ.get(CONFIG_ENV)
    path = Path(named or DEFAULT_CONFIG).expanduser().resolve()
    if named and not path.is_file():
        raise InvalidInputError(f"configuration file {path} does not exist: make one with `scion init {path.parent}`")

    class FileSettings(Settings):
        file: ClassVar[Path | None] = path if path.is_file() else None

    _check_environment()
    try:
        return FileSettings(home=path.parent, **dict(overrides or {}))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        hint = (
            "remove it, or see `scion init --print` for the known keys"
            if first["type"] == "extra_forbidden"
            else "correct it"
        )
        origin = path.name if path.is_file() else "the environment"
        raise InvalidInputError(
            f"{origin}: {key}: {first['msg']} (value: {first['input']!r}); {hint}", field=key
        ) from error
    except ValueError as error:  # TOML syntax, or JSON in an environment variable
        raise InvalidInputError(f"{path.name}: {error}") from error


def _check_environment() -> None:
    """A misspelt section would be ignored in silence: pydantic looks only for the names that it knows."""
    for name in os.environ:
        section, separator, _ = name.lower().removeprefix("scion_").partition("__")
        if name.lower().startswith("scion_") and separator and section not in Settings.model_fields:
            raise InvalidInputError(
                f"environment variable {name}: there is no section {section!r}; remove it, or see `scion init --print`",
                field=section,
            )
