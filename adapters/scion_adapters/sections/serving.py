"""What the server needs, from the base to the rollouts."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from scion_adapters.sections.section import Section

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class BaseSection(Section):
    """The frozen, quantized model that the server serves and the trainer trains on."""

    model: str = Field("base", description="Directory (or Hugging Face id) of the base model.")
    served_name: str = Field("base", description="The name under which the base itself is served.")
    quantization: Literal["nf4", "none"] = Field(
        "nf4", description="How server and trainer both hold the base: nf4 (bitsandbytes, double quantization) or none."
    )


class DatabaseSection(Section):
    """Where everything is recorded."""

    url: str = Field(
        "sqlite:///scion.db",
        description="SQLAlchemy URL. SQLite for one host; postgresql+psycopg://user:password@host/db for several.",
    )


class StoreSection(Section):
    """Where adapter files, snapshots, runs and reports lie."""

    url: str = Field("artifacts", description="A directory, or an fsspec URL such as s3://bucket/prefix.")
    cache: str = Field(
        "cache", description="Local directory for what a remote store holds; unused for a directory store."
    )
    max_upload_mib: int = Field(1024, ge=1, description="Largest adapter that is taken over HTTP.")


class ServerSection(Section):
    """How `scion serve` starts vLLM."""

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on.")
    max_loras: int = Field(
        4, ge=1, description="Distinct adapters in one batch (champion, challenger, draining, candidate)."
    )
    max_cpu_loras: int = Field(
        12, ge=1, description="Adapters held in memory: at least max_loras, one for a candidate and one that drains."
    )
    max_lora_rank: Literal[1, 8, 16, 32, 64, 128, 256, 320, 512] = Field(16, description="Highest rank that is served.")
    target_modules: tuple[str, ...] = Field(LORA_TARGETS, description="The modules adapters may change.")
    max_model_len: int | None = Field(
        None, ge=1, description="Longest prompt plus answer in tokens; unset = the model's own."
    )
    threads: int | None = Field(
        None, ge=1, description="CPU build only: cores for each of vLLM's workers, from the first on; unset = all."
    )
    api_server_count: int | None = Field(
        None, ge=1, description="HTTP server processes; unset = one for each copy of the engine."
    )
    data_parallel_size: int = Field(
        1, ge=1, description="Copies of the engine behind them, each with all adapters; vLLM balances between them."
    )
    shutdown_timeout_s: int = Field(
        15, ge=1, description="Seconds that answers may run on after a SIGTERM; keep a supervisor's patience longer."
    )
    kv_cache_gib: int = Field(1, ge=1, description="CPU build only: GiB of key-value cache.")
    ppo_rollouts: bool = Field(
        False,
        description="Let PPO sample here at low priority: requests are scheduled by priority, and log-probs are "
        "reported at the sampling temperature.",
    )
    extra_args: tuple[str, ...] = Field((), description="Further arguments for vLLM, as on its command line.")


class CaptureSection(Section):
    """Recording of completions."""

    enabled: bool = Field(
        True, description="Record routed completions. Without them, ratings cannot become training data."
    )
    queue_size: int = Field(10_000, ge=1, description="Answers held in memory before one is counted as lost.")
    queue_max_mib: int = Field(
        256, ge=1, description="Memory that these may take: requests that carry images are large. Beyond it: lost too."
    )
    flush_interval_s: float = Field(
        0.1, gt=0, description="How long an answer waits, at most, to be written in a batch."
    )
    journal: str = Field(
        "journal", description="Local directory of the journal that answers wait in until the database took them."
    )
    journal_max_mib: int = Field(1024, ge=1, description="The journal's bound; past it answers are counted as lost.")
    cores: str | None = Field(
        None,
        description='Cores for the recorder\'s process alone, such as "7"; `scion serve` keeps vLLM off them. '
        "Unset = it takes what the server leaves.",
    )


class PrivacySection(Section):
    """What is known of a user is a keyed hash."""

    hash_key_file: str = Field(
        "user_hash.key", description="File with the secret that user names are hashed with; made if absent."
    )
    hash_key: str | None = Field(
        None, description="The secret itself, for several hosts (better set as SCION_PRIVACY__HASH_KEY)."
    )


class RolloutSection(Section):
    """How a version is carried to users when nothing else is said."""

    steps: tuple[float, ...] = Field((0.1, 0.5, 1.0), description="Shares of users, ascending, the last one 1.0.")
    every_s: float = Field(300.0, ge=0, description="Seconds that each step lasts.")
    guard: bool = Field(
        True, description="Abort when ratings show, at 99.9% confidence, that users like the challenger less."
    )
    rollback_window_s: float = Field(
        86_400.0,
        ge=0,
        description="Seconds for which `scion adapters gc` keeps the files of a version that was champion.",
    )
    poll_interval_s: float = Field(
        0.25, gt=0, description="How often servers look for changed routing when nothing tells them."
    )
    heartbeat_s: float = Field(
        2.0, gt=0, description="How often a server reports; after five silent intervals it stops counting."
    )
