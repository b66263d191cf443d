"""Settings: one `scion.toml`, overridable by `SCION_<SECTION>__<KEY>` environment variables; unknown keys are errors.

Every field carries a description; `scion init` writes them out as the commented configuration, so there is one source.
Relative paths are relative to the folder of the file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, TomlConfigSettingsSource

from scion_adapters.errors import InvalidInputError
from scion_adapters.records import check_adapter_name

CONFIG_ENV = "SCION_CONFIG"
DEFAULT_CONFIG = "scion.toml"
RecipeName = Literal["auto", "sft", "kto", "dpo", "reward", "ppo", "distill"]
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


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


class LoraSection(Section):
    """Shape of the adapters that runs make."""

    rank: int = Field(16, ge=1, description="LoRA rank; at most server.max_lora_rank.")
    alpha: int = Field(32, ge=1, description="LoRA alpha; the update is scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the LoRA path while training.")


class KtoSection(Section):
    """KTO: thumbs up and down (Ethayarajh et al., 2024)."""

    learning_rate: float | None = Field(
        None, gt=0, description="Peak learning rate; unset = 0.38 / hidden size of the base: 9e-5 for an 8B."
    )
    epochs: float | None = Field(
        None, gt=0, description="Passes over the snapshot; unset = 2400 / examples, at least 1 and at most 4."
    )
    beta: float | None = Field(
        None, gt=0, description="Pull towards the parent; unset = 20 / mean answer tokens, at most 1."
    )
    likelihood_weight: float = Field(
        5.0, ge=0, description="Weight, times beta, of liked answers' likelihood beside KTO's loss: it keeps facts."
    )
    batch_size: int = Field(16, ge=2, description="Examples per optimizer step.")


class SftSection(Section):
    """SFT: corrections and liked answers."""

    learning_rate: float | None = Field(
        None, gt=0, description="Peak learning rate; unset = 0.8 / hidden size of the base: 2e-4 for an 8B."
    )
    epochs: float = Field(3.0, gt=0, description="Passes over the snapshot.")
    batch_size: int = Field(16, ge=1, description="Examples per optimizer step.")


class DpoSection(Section):
    """DPO: pairs of which one answer is preferred to the other (Rafailov et al., 2023)."""

    learning_rate: float | None = Field(
        None, gt=0, description="Peak learning rate; unset = 0.38 / hidden size of the base: 9e-5 for an 8B."
    )
    epochs: float | None = Field(
        None, gt=0, description="Passes over the pairs; unset = 2400 / pairs, at least 1 and at most 8."
    )
    beta: float | None = Field(
        None, gt=0, description="Pull towards the parent; unset = 20 / mean answer tokens, at most 1."
    )
    likelihood_weight: float = Field(
        1.0, ge=0, description="Weight, times beta, of preferred answers' likelihood beside DPO's loss: it keeps facts."
    )
    batch_size: int = Field(16, ge=2, description="Pairs per optimizer step.")


class RewardSection(Section):
    """The reward model: LoRA members with a scalar head on the base, and the gate that it must pass before PPO."""

    learning_rate: float | None = Field(
        None, gt=0, description="Peak learning rate; unset = 0.4 / hidden size of the base: 1e-4 for an 8B."
    )
    epochs: float | None = Field(
        None, gt=0, description="Passes of each member over its ratings; unset = 2400 / examples, from 1 to 4."
    )
    batch_size: int = Field(16, ge=2, description="Thumbs and pairs per optimizer step.")
    members: int = Field(
        3, ge=1, le=9, description="LoRAs trained one after the other, each on its own draw of the raters."
    )
    disagreement_penalty: float = Field(
        1.0, ge=0, description="Standard deviations over the members that are taken off their mean score."
    )
    rater_bias_std: float = Field(
        1.0, gt=0, description="How much raters are expected to differ in liking anything at all, in log-odds."
    )
    min_auroc: float = Field(
        0.6, ge=0.5, lt=1, description="Its gate: AUROC (accuracy on pairs) on unseen users, at the interval's low end."
    )
    max_calibration_error: float = Field(
        0.15, gt=0, le=1, description="Its gate: how far its calibrated probabilities may be off, on average."
    )
    max_length_correlation: float = Field(
        0.6, gt=0, le=1, description="Its gate: how far scores may rise with length (rank correlation)."
    )


class PpoSection(Section):
    """PPO: the model answers its users' prompts, and learns from what the reward model says of it."""

    learning_rate: float | None = Field(
        None, gt=0, description="Peak learning rate; unset = 0.1 / hidden size of the base: 2.4e-5 for an 8B."
    )
    epochs: float | None = Field(
        None, gt=0, description="How often each prompt is answered; unset = 1600 / prompts, at least 1 and at most 8."
    )
    batch_size: int = Field(64, ge=2, description="Answers sampled before each round of learning.")
    max_tokens: int = Field(128, ge=1, description="Longest answer in tokens.")
    temperature: float = Field(1.0, gt=0, description="Temperature of the answers, and of the policy that learns.")
    passes: int = Field(4, ge=1, description="Passes over the answers of a round.")
    minibatches: int = Field(4, ge=1, description="Updates in each pass.")
    clip: float = Field(0.2, gt=0, lt=1, description="How far an update may move a token's probability ratio from 1.")
    kl_coefficient: float = Field(
        0.05, ge=0, description="Penalty at the start, in standard deviations of the reward per nat from the parent."
    )
    kl_target: float = Field(6.0, gt=0, description="Nats per answer from the parent that the penalty is adapted to.")
    rollouts: Literal["auto", "server", "engine", "local"] = Field(
        "auto",
        description="Who samples: the live server at low priority (server.ppo_rollouts), a vLLM of the run's own, or "
        "the trainer itself; auto takes the first of them that is there and worth its start.",
    )
    server_concurrency: int = Field(
        16, ge=1, description="Answers sampled at once from the live server, in the steps that its users leave free."
    )
    missing_eos_penalty: float = Field(
        1.0, ge=0, description="Standard deviations of the reward taken off an answer that was cut off at max_tokens."
    )


class DistillSection(Section):
    """Distillation: a teacher answers the prompts whose answers users disliked, and sft learns what it says."""

    teacher_url: str | None = Field(
        None, description="OpenAI-compatible endpoint that users' prompts are sent to, e.g. http://127.0.0.1:9000/v1."
    )
    teacher_model: str = Field("", description="The model's name there: a larger one, or another adapter.")
    api_key_env: str = Field("SCION_TEACHER_API_KEY", description="Environment variable with the key for it, if any.")
    max_prompts: int = Field(500, ge=1, description="Prompts asked in one run, the newest dislikes first.")
    max_tokens: int = Field(512, ge=1, description="Longest answer in tokens; those cut off are not learned from.")
    temperature: float = Field(0.7, ge=0, description="Temperature of the teacher's answers.")
    concurrency: int = Field(8, ge=1, description="Requests at once.")
    min_answers: int = Field(20, ge=1, description="A run is refused when fewer answers pass the filter.")
    learning_rate: float | None = Field(
        None, gt=0, description="Peak learning rate; unset = 0.8 / hidden size of the base: 2e-4 for an 8B."
    )
    epochs: float = Field(3.0, gt=0, description="Passes over the teacher's answers.")
    batch_size: int = Field(16, ge=1, description="Examples per optimizer step.")


class AutoSection(Section):
    """The recipe `auto`: corrections and likes go to sft, thumbs to kto, pairs to dpo, many ratings to ppo."""

    min_pairs: int = Field(
        40, ge=1, description="Pairs (answers to one prompt, judged apart) from which on dpo is chosen."
    )
    ppo_min_ratings: int = Field(
        500, ge=1, description="Ratings from which on ppo is chosen, once a reward model has passed its gate."
    )


class TrainerSection(Section):
    """When and how `scion trainer` and `scion train` make versions."""

    server_url: str = Field("http://127.0.0.1:8000", description="The server that gates ask.")
    api_key: str | None = Field(None, description="Its API key (better set as SCION_TRAINER__API_KEY).")
    schedule: str | None = Field(None, description='Cron expression, e.g. "0 3 * * *"; unset = no fixed times.')
    min_new_ratings: int | None = Field(
        None, ge=1, description="Start a run after this many new ratings; unset = never by count."
    )
    check_interval_s: float = Field(60.0, gt=0, description="How often the daemon counts new ratings.")
    recipe: RecipeName = Field("kto", description="Recipe of scheduled runs; auto chooses by the ratings.")
    rollout: bool = Field(True, description="Start a rollout when a scheduled run's candidate passed the gates.")
    min_ratings: int = Field(40, ge=2, description="A run with fewer usable ratings is refused.")
    heldout_share: float = Field(0.15, gt=0, lt=0.5, description="Share of users whose ratings are kept for the gates.")
    newest_share: float = Field(
        0.05, ge=0, lt=0.5, description="Share of ratings, the newest, that are kept for the gates as well."
    )
    kl_budget: float = Field(
        4.0,
        gt=0,
        description="Nats per token from the base, measured on held-out prompts, beyond which nothing is published.",
    )
    replay_share: float = Field(
        0.2,
        ge=0,
        lt=1,
        description="Share of a run's ratings that are drawn from earlier snapshots, where max_age_days or --since "
        "leaves those out.",
    )
    max_age_days: float | None = Field(None, gt=0, description="Leave older ratings out; unset = use all.")
    red_team_share: float = Field(
        0.1, ge=0, lt=1, description="Largest share of a snapshot that findings of the red team may have; 0 = none."
    )
    max_length: int = Field(
        1024, ge=16, description="Longest prompt plus answer in tokens; longer rows are dropped and counted."
    )
    checkpoint_every_steps: int = Field(
        20, ge=1, description="Optimizer steps between checkpoints: what a kill can lose."
    )
    micro_batch_size: int | None = Field(
        None, ge=1, description="Examples in memory at once; unset = the recipe's batch_size."
    )
    threads: int | None = Field(
        None, ge=1, description="CPU threads of a run; unset = all. Server and trainer share the cores."
    )
    cores: str | None = Field(
        None, description='CPU cores of a run and of the trainer\'s commands, e.g. "2-3" (Linux); unset = any.'
    )
    seed: int = Field(0, ge=0, description="Seed of runs.")
    report_to: str = Field("none", description="Where transformers reports metrics: none, tensorboard, wandb…")
    lora: LoraSection = Field(default_factory=LoraSection)
    kto: KtoSection = Field(default_factory=KtoSection)
    sft: SftSection = Field(default_factory=SftSection)
    dpo: DpoSection = Field(default_factory=DpoSection)
    reward: RewardSection = Field(default_factory=RewardSection)
    ppo: PpoSection = Field(default_factory=PpoSection)
    distill: DistillSection = Field(default_factory=DistillSection)
    auto: AutoSection = Field(default_factory=AutoSection)


class GatesSection(Section):
    """What a candidate must pass before it meets a user."""

    length_ratio: tuple[float, float] = Field(
        (0.1, 6.0), description="Mean answer length in tokens of the candidate over the parent's: allowed range."
    )
    max_empty_share: float = Field(
        0.02, ge=0, le=1, description="Share of empty answers allowed beyond the base's own."
    )
    max_looping_share: float = Field(
        0.05, ge=0, le=1, description="Share of answers that repeat themselves, allowed beyond the base's own."
    )
    max_unfinished_share: float = Field(
        0.25, ge=0, le=1, description="Share of answers cut off at max_tokens, allowed beyond the base's own."
    )
    max_strange_share: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Share of answer tokens that the base gives less than 0.25%, allowed beyond that of its own.",
    )
    heldout_margin: float = Field(
        0.0,
        description="How much better than its parent a candidate must separate liked from disliked held-out answers.",
    )
    retention_file: str | None = Field(
        None,
        description="JSON lines with messages, prefix and answer that must not be forgotten; unset = a general set.",
    )
    retention_max_drop: float = Field(
        0.12,
        gt=0,
        description="Nats per token by which the retention items that the base knows may become less likely.",
    )
    retention_max_missed: float = Field(
        0.05,
        ge=0,
        le=1,
        description="Share of these answers that a candidate, asked freely, may miss beyond its parent and the base.",
    )
    red_team_suite: str | None = Field(
        None, description="JSON lines of probes (docs/red-teaming.md) for the red team; unset = a small suite of ours."
    )
    red_team_max_share: float | None = Field(
        None, ge=0, le=1, description="Share of probes that a version may fail at all; unset = only relative bounds."
    )
    red_team_max_increase: float = Field(
        0.05, ge=0, le=1, description="Share of probes on which a candidate may fail more often than parent and base."
    )
    sycophancy_max_increase: float = Field(
        0.05, ge=0, le=1, description="By how much more of what a user claims wrongly a candidate may give in to."
    )
    probe_alpha: float = Field(
        0.01, gt=0, lt=1, description="Probes reject a candidate only if chance is less likely than this to be why."
    )
    lm_eval_tasks: tuple[str, ...] = Field(
        (), description="Tasks of lm-evaluation-harness (the extra `eval`) that a candidate must not get worse at."
    )
    lm_eval_include: str | None = Field(None, description="Folder with task files of one's own for it.")
    lm_eval_command: str = Field("lm_eval", description="The program: it may lie in an environment of its own.")
    lm_eval_args: tuple[str, ...] = Field(
        (), description='Further arguments for it, such as ["--limit", "200", "--apply_chat_template"].'
    )
    lm_eval_max_drop: float = Field(
        0.02, ge=0, description="By how much a task's mean score may fall below the parent's."
    )
    lm_eval_timeout_s: float = Field(3600.0, gt=0, description="How long it may take for one model.")
    parity_max_delta: float = Field(
        0.01, gt=0, description="Nats by which server and trainer may differ, on average, in a token's log-prob."
    )
    general_file: str | None = Field(
        None,
        description="Plain text, paragraphs apart by an empty line, that must not be forgotten; unset = a general one.",
    )
    forgetting_max_drop: float = Field(
        0.2,
        gt=0,
        description="Nats per token by which general text, and what users liked of earlier versions, may become "
        "less likely than under the champion.",
    )
    max_refusal_rise: float = Field(
        0.2, ge=0, le=1, description="Share of answers that refuse, allowed beyond the parent's."
    )
    max_question_rise: float = Field(
        0.5, ge=0, le=1, description="Share of answers that end with a question, allowed beyond the parent's."
    )
    max_agreement_rise: float = Field(
        0.3, ge=0, le=1, description="Share of answers that begin by agreeing, allowed beyond the parent's."
    )
    max_repeated_rise: float = Field(
        0.5, ge=0, le=1, description="Share of prompts answered as another one was, allowed beyond the parent's."
    )
    min_win_rate: float = Field(
        0.5, gt=0, lt=1, description="Share of comparisons that a candidate must win against the champion."
    )
    judge_url: str | None = Field(
        None, description="OpenAI-compatible endpoint (…/v1) of a judge; unset = the reward model, if one passed."
    )
    judge_model: str = Field("judge", description="The judge's model name there.")
    judge_api_key: str | None = Field(None, description="Its API key (better set as SCION_GATES__JUDGE_API_KEY).")
    prompt_baseline_shots: int = Field(
        4, ge=0, description="Liked answers shown to the base as examples: what training is compared with; 0 = none."
    )
    prompt_baseline_margin: float | None = Field(
        None, description="By how much (nats per token) training must beat those examples; unset = it is only told."
    )
    approve_first: int = Field(
        3,
        ge=0,
        description="Rollouts that follow a run wait for `scion rollout approve` until so many versions were promoted.",
    )
    max_prompts: int = Field(64, ge=1, description="Prompts for the behaviour gates.")
    max_tokens: int = Field(
        128, ge=1, description="Longest answer, in tokens, that the behaviour gates let a model give."
    )
    concurrency: int = Field(16, ge=1, description="Requests at once.")
    server_timeout_s: float = Field(
        120.0, gt=0, description="How long the gates wait until all servers loaded the candidate."
    )


class AdapterSection(Section):
    """One line of versions. Fields that are set override [trainer] for this adapter."""

    schedule: str | None = Field(None, description="Cron expression for this adapter.")
    min_new_ratings: int | None = Field(None, ge=1, description="New ratings that start a run of this adapter.")
    recipe: RecipeName | None = Field(None, description="Recipe of this adapter's scheduled runs.")


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
