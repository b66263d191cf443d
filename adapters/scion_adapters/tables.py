"""The database's schema, in one place: SQLAlchemy Core tables that every package uses through its own store.

Times are Unix seconds (UTC). JSON columns hold what is shown to people and never joined on. `number` 0 is the base.
Migrations (migrations/versions/) create exactly this; a test compares the two.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKeyConstraint,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    Unicode,
    UniqueConstraint,
)

from scion_adapters.words import Words

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQLite only autoincrements INTEGER primary keys; PostgreSQL wants 64 bits.
_BigId = BigInteger().with_variant(Integer(), "sqlite")

# --- what exists ---------------------------------------------------------------------------------------------------

adapters = Table(
    "adapters",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("created_at", Float, nullable=False),
)

versions = Table(
    "versions",
    metadata,
    Column("adapter", String(64), nullable=False),
    Column("number", Integer, nullable=False),  # 1, 2, 3… per adapter, never reused
    Column("lora_id", Integer, nullable=False),  # vLLM's lora_int_id: unique over all adapters, never reused
    Column("digest", String(71), nullable=False),  # "sha256:<64 hex>" of the artifact
    Column("state", String(16), nullable=False),  # records.VersionState
    Column("parent", Integer, nullable=False),  # version number it was trained from; 0 = the base
    Column("base_fingerprint", String(71), nullable=False),
    Column("recipe", String(32)),
    Column("run_id", String(64)),
    Column("snapshot_id", String(71)),
    Column("metrics", JSON, nullable=False),
    Column("rank", Integer, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("evaluation_key", String(64), nullable=False),  # lets the gates, and nobody else, ask a candidate
    Column("reason", Words),  # why it was rejected or retired
    Column("created_at", Float, nullable=False),
    Column("created_by", String(128), nullable=False),
    Column("files_removed_at", Float),  # by gc; the row stays: numbers, ids and lineage are for ever
    PrimaryKeyConstraint("adapter", "number"),
    ForeignKeyConstraint(["adapter"], ["adapters.name"]),
    UniqueConstraint("lora_id"),
    UniqueConstraint("run_id"),  # a run publishes once, however often it is resumed
    Index(None, "digest"),
)

counters = Table(  # numbers that only grow, so that nothing is ever reused: "lora_id", "number:<adapter>", "routing"
    "counters",
    metadata,
    Column("name", String(96), primary_key=True),
    Column("value", BigInteger, nullable=False),
)

aliases = Table(
    "aliases",
    metadata,
    Column("adapter", String(64), nullable=False),
    Column("alias", String(64), nullable=False),
    Column("number", Integer, nullable=False),
    Column("updated_at", Float, nullable=False),
    PrimaryKeyConstraint("adapter", "alias"),
    ForeignKeyConstraint(["adapter"], ["adapters.name"]),
)

alias_history = Table(
    "alias_history",
    metadata,
    Column("id", _BigId, primary_key=True, autoincrement=True),
    Column("adapter", String(64), nullable=False),
    Column("alias", String(64), nullable=False),
    Column("number", Integer),  # NULL: the alias was removed
    Column("previous", Integer),
    Column("actor", String(128), nullable=False),
    Column("reason", Words, nullable=False),
    Column("at", Float, nullable=False),
    Index(None, "adapter", "alias", "at"),
)

# --- who serves it -------------------------------------------------------------------------------------------------

rollouts = Table(
    "rollouts",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("adapter", String(64), nullable=False),
    Column("number", Integer, nullable=False),  # the challenger
    Column("stable", Integer, nullable=False),  # the champion it started from
    Column("state", String(16), nullable=False),  # records.RolloutState
    Column("steps", JSON, nullable=False),  # weights in (0, 1], ascending, e.g. [0.1, 0.5, 1.0]
    Column("step", Integer, nullable=False),  # index into steps; -1 = waiting until every live process has loaded it
    Column("every_s", Float),  # how long each step lasts; neither this nor answers: transitions.is_return
    Column("after_requests", Integer),  # or: how many answers of the challenger each step lasts
    Column("guard", Boolean, nullable=False),  # abort when ratings show that users like the challenger less
    Column("step_started_at", Float, nullable=False),
    Column("paused_by", String(128)),
    Column("message", Words, nullable=False),  # what it is waiting for, or why it ended, in words
    Column("actor", String(128), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("updated_at", Float, nullable=False),
    Column("revision", Integer, nullable=False),  # optimistic lock: a person's write makes the controller's stale
    Index(None, "adapter", "state"),
)

events = Table(  # append-only: a trigger refuses UPDATE and DELETE
    "events",
    metadata,
    Column("id", _BigId, primary_key=True, autoincrement=True),
    Column("at", Float, nullable=False),
    Column("kind", String(64), nullable=False),  # dotted: "version.published", "rollout.step", "alias.set"…
    Column("adapter", String(64)),
    Column("number", Integer),
    Column("actor", String(128), nullable=False),
    Column("reason", Words, nullable=False),
    Column("data", JSON, nullable=False),
    Index(None, "adapter", "id"),
)

leases = Table(
    "leases",
    metadata,
    Column("name", String(96), primary_key=True),
    Column("holder", String(128), nullable=False),
    Column("renewed_at", Float, nullable=False),
    Column("expires_at", Float, nullable=False),
)

replicas = Table(  # one row per live server process
    "replicas",
    metadata,
    Column("id", String(128), primary_key=True),
    Column("host", String(255), nullable=False),
    Column("pid", Integer, nullable=False),
    Column("engine", String(255), nullable=False),  # the same for API server processes that share one engine
    Column("url", String(255), nullable=False),
    Column("started_at", Float, nullable=False),
    Column("heartbeat_at", Float, nullable=False),
    Column("max_loras", Integer, nullable=False),
    Column("max_cpu_loras", Integer, nullable=False),
    Column("max_lora_rank", Integer, nullable=False),
    Column("loaded", JSON, nullable=False),  # list of lora_id that the engine holds
    Column("failed", JSON, nullable=False),  # {"<lora_id>": "why it could not be loaded"}
    Column("in_flight", JSON, nullable=False),  # {"<lora_id>": running requests}
    Column("routing_revision", BigInteger, nullable=False),  # the routing it acts on
    Column("base_fingerprint", String(71), nullable=False),
)

api_keys = Table(  # the key itself is never stored
    "api_keys",
    metadata,
    Column("id", String(16), primary_key=True),  # the public part of the key
    Column("hash", String(64), nullable=False),  # SHA-256 of the whole key: it is random, so nothing slower is needed
    Column("name", String(128), nullable=False),  # whose it is, in a person's words
    Column("scopes", JSON, nullable=False),  # list of keys.Scope
    Column("created_at", Float, nullable=False),
    Column("created_by", String(128), nullable=False),
    Column("revoked_at", Float),
)

# --- what users said -----------------------------------------------------------------------------------------------

completions = Table(
    "completions",
    metadata,
    Column("id", String(255), primary_key=True),
    Column("record_id", String(64), nullable=False),  # ours; tells a re-delivered record from a reused completion id
    Column("adapter", String(64), nullable=False),
    Column("number", Integer, nullable=False),
    Column("probability", Float, nullable=False),  # with which this version was assigned
    Column("rollout_id", String(64)),
    Column("requested_model", String(255), nullable=False),
    Column("route", String(32), nullable=False),  # chat | completions | responses | messages
    Column("user_hash", String(64)),
    Column("conversation", String(255)),
    Column("request", JSON, nullable=False),  # {"messages": […]} or {"prompt": …}, tools, and sampling parameters
    Column("choices", JSON, nullable=False),  # [{"index", "message" | "text", "finish_reason"}…]
    Column("prompt_tokens", Integer),
    Column("completion_tokens", Integer),
    Column("finish_reason", String(32)),
    Column("latency_ms", Float, nullable=False),
    Column("first_token_ms", Float),
    Column("stream", Boolean, nullable=False),
    Column("created_at", Float, nullable=False),
    Index(None, "adapter", "number", "created_at"),
    Index(None, "user_hash"),
)

feedback = Table(
    "feedback",
    metadata,
    Column("id", String(255), primary_key=True),
    Column("sequence", BigInteger, nullable=False),  # order of arrival; the last vote wins
    Column("idempotency_key", String(255)),
    Column("body_digest", String(64), nullable=False),
    Column("completion_id", String(255), nullable=False),
    Column("choice_index", Integer, nullable=False),
    Column("name", String(64), nullable=False),
    Column("value", Float),  # 0..1; NULL when only a comment or a correction was given
    Column("comment", Text),
    Column("correction", Text),
    Column("user_hash", String(64)),
    Column("source", String(32), nullable=False),  # "user"; later "red_team", "import"…
    Column("metadata", JSON, nullable=False),
    Column("counts", Boolean, nullable=False),  # false once a later vote of the same user replaced it
    Column("created_at", Float, nullable=False),
    Column("deleted_at", Float),
    UniqueConstraint("idempotency_key"),
    Index(None, "completion_id"),
    Index(None, "user_hash"),
    Index(None, "created_at"),
)

# --- what was made of it -------------------------------------------------------------------------------------------

snapshots = Table(
    "snapshots",
    metadata,
    Column("id", String(71), primary_key=True),  # "sha256:…" of its rows
    Column("adapter", String(64), nullable=False),
    Column("path", Text, nullable=False),
    Column("manifest", JSON, nullable=False),  # counts, split rule, what was dropped and why
    Column("created_at", Float, nullable=False),
)

snapshot_rows = Table(
    "snapshot_rows",
    metadata,
    Column("snapshot_id", String(71), nullable=False),
    Column("feedback_id", String(255), nullable=False),
    Column("completion_id", String(255), nullable=False),
    Column("user_hash", String(64)),
    Column("split", String(16), nullable=False),  # train | heldout | newest
    PrimaryKeyConstraint("snapshot_id", "feedback_id"),
    ForeignKeyConstraint(["snapshot_id"], ["snapshots.id"]),
    Index(None, "feedback_id"),
    Index(None, "user_hash"),
)

runs = Table(
    "runs",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("adapter", String(64), nullable=False),
    Column("recipe", String(32), nullable=False),
    Column("state", String(16), nullable=False),  # records.RunState
    Column("parent", Integer, nullable=False),
    Column("snapshot_id", String(71)),
    Column("candidate", Integer),  # the version it published
    Column("config", JSON, nullable=False),
    Column("metrics", JSON, nullable=False),
    Column("directory", Text, nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("error", Words),
    Column("actor", String(128), nullable=False),
    Column("created_at", Float, nullable=False),
    Column("updated_at", Float, nullable=False),
    Column("finished_at", Float),
    Index(None, "adapter", "created_at"),
)

scheduler_jobs = Table(  # APScheduler's own, exactly as its SQLAlchemyJobStore would make it
    "scheduler_jobs",
    metadata,
    Column("id", Unicode(191), primary_key=True),
    Column("next_run_time", Float(25), index=True),
    Column("job_state", LargeBinary, nullable=False),
)
