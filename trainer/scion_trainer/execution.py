"""What a run does, from its frozen ratings to a published candidate: the story that run.py tells in a process.

Snapshot, parent, examples, memory, base, training with checkpoints, distance from the base, export, publication. Each
step can be done again by a later attempt: what an earlier one finished is found, not repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scion_adapters.artifacts import ArtifactStore
from scion_adapters.database import Database
from scion_adapters.errors import InvalidInputError
from scion_adapters.fingerprint import BaseInfo, base_info
from scion_adapters.preflight import AdapterLimits
from scion_adapters.records import BASE_NUMBER, Run, Version, VersionRef
from scion_adapters.registry import Registry, open_registry
from scion_adapters.settings import Settings
from scion_feedback.snapshots import Snapshot, build_snapshot, find_snapshot, load_snapshot
from scion_trainer import kl
from scion_trainer.chat_tokens import ChatTokens
from scion_trainer.checkpoints import CHECKPOINTS, newest_complete
from scion_trainer.config import RunConfig, run_config
from scion_trainer.defaults import resolve
from scion_trainer.estimation import Request, ensure_fits
from scion_trainer.lowering import train_within_memory
from scion_trainer.memory import Estimate, gib, peak_bytes
from scion_trainer.parity import record_parity
from scion_trainer.progress import Progress, curves, read_metrics
from scion_trainer.recipes import RECIPES, Recipe, RunContext, auto
from scion_trainer.recipes.auto import AUTO
from scion_trainer.reward.store import newest_reward_model, pinned_reward_model
from scion_trainer.runs import RunStore
from scion_trainer.stopping import RunInterruptedError

if TYPE_CHECKING:
    from scion_trainer.examples import Prepared


def execute(
    settings: Settings,
    database: Database,
    run_id: str,
    *,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Version | None:
    """Do the run, or the rest of it, and return the version that it published (None: its recipe makes none)."""
    runs = RunStore(database)
    registry = open_registry(settings, database)
    run = runs.start(run_id)
    directory = Path(run.directory)
    directory.mkdir(parents=True, exist_ok=True)
    registry.ensure_adapter(run.adapter)
    if published := _published(registry, run):  # killed between publication and the note of it
        runs.succeed(run_id, candidate=published.number, metrics=published.metrics)
        return published

    with Progress(directory) as progress:
        base = base_info(settings)
        parent = _parent(registry, run, base, settings)
        snapshot = _snapshot(database, registry.store, run, RunConfig.from_json(run.config))
        runs.set_snapshot(run_id, snapshot.id)
        if run.recipe == AUTO:
            run = _choose(settings, runs, run, snapshot, base)
            progress.say(f"recipe {run.recipe}: {run.metrics['chosen_why']}")
        work = _Work(settings, runs, registry, run, directory, progress, base, parent, snapshot, stop_requested)
        plan = _plan(work)
        work.stop_if_asked()
        trained = _train(work, plan)
        if not plan.recipe.makes_version:
            runs.succeed(run_id, candidate=None, metrics=trained.metrics)
            return None
        trained = _with_distance(work, plan, trained)
        return _publish(work, plan, trained)


@dataclass(frozen=True, slots=True)
class _Work:
    """A run, and all that it has to do with."""

    settings: Settings
    runs: RunStore
    registry: Registry
    run: Run  # its recipe is chosen
    directory: Path
    progress: Progress
    base: BaseInfo
    parent: Version | None
    snapshot: Snapshot
    stop_requested: Callable[[], bool]

    def stop_if_asked(self) -> None:
        if self.stop_requested():
            raise RunInterruptedError("stopped before its end")


@dataclass(frozen=True, slots=True)
class _Plan:
    """What will be trained, how, and what that needs. Nothing is loaded yet."""

    recipe: Recipe
    config: RunConfig  # its defaults resolved for this base and these examples
    prepared: Prepared
    heldout: Prepared
    reward_model: Path | None
    needed: Estimate
    device: str
    resume_from: Path | None


@dataclass(frozen=True, slots=True)
class _Trained:
    model: Any
    chat_tokens: ChatTokens
    metrics: dict[str, Any]
    lineage: dict[str, Any]  # of the recipe's own, for scion.json


def _plan(work: _Work) -> _Plan:
    """Raises what is wrong with the examples, the reward model or the memory, before anything heavy is loaded."""
    from scion_trainer.base import default_device, load_tokenizer
    from scion_trainer.examples import prepare

    run, base, parent = work.run, work.base, work.parent
    recipe, config = RECIPES[run.recipe], RunConfig.from_json(run.config)
    found = newest_complete(work.directory / CHECKPOINTS)
    for note in found.notes:
        work.progress.say(note)
    if found.path is not None:
        work.progress.say(f"resuming {run.id} at step {found.step}")
    tokenizer = load_tokenizer(work.settings)
    prepared, heldout = (
        prepare(recipe.examples(work.snapshot.split(split)), tokenizer, max_length=config.max_length)
        for split in ("train", "heldout")
    )
    recipe.check(list(prepared.examples), config)
    reward_model = newest_reward_model(work.runs.database, run.adapter, base.fingerprint)
    if recipe.needs_reward_model:
        reward_model = pinned_reward_model(work.directory, reward_model)
    config = resolve(config, base, num_examples=len(prepared.examples), mean_answer_tokens=prepared.mean_answer_tokens)
    device = default_device().type
    needed = ensure_fits(
        Request(
            base,
            config,
            quantized=work.settings.base.quantization == "nf4",
            rank=config.rank if parent is None else parent.rank,
            longest_tokens=prepared.longest_tokens,
            has_parent=parent is not None,
        ),
        device,
    )
    return _Plan(recipe, config, prepared, heldout, reward_model, needed, device, found.path)


def _train(work: _Work, plan: _Plan) -> _Trained:
    """Load the base, train, and measure what that took."""
    from scion_trainer.base import load_base
    from scion_trainer.lora import start_adapter

    run, config, prepared = work.run, plan.config, plan.prepared
    work.progress.say(
        f"training {run.adapter} by {run.recipe} on {len(prepared.examples)} examples from "
        f"{VersionRef(run.adapter, run.parent)}; needs about {gib(plan.needed.total_bytes)}"
    )
    loaded = load_base(work.settings)
    start = None if work.parent is None else work.registry.store.path(work.parent.digest)
    model, shape = start_adapter(loaded, config, start)
    if shape.note:
        work.progress.say(shape.note)
    work.stop_if_asked()
    context = RunContext(
        config=config,
        model=model,
        tokenizer=loaded.tokenizer,
        examples=prepared.examples,
        directory=work.directory,
        resume_from=plan.resume_from,
        gradient_checkpointing=plan.needed.gradient_checkpointing,
        progress=work.progress,
        stop_requested=work.stop_requested,
        heldout=plan.heldout.examples,
        base=work.base,
        reward_model=plan.reward_model,
        settings=work.settings,
        registry=work.registry,
    )
    del model  # a try that ran out of memory must leave nothing behind
    context, measured = train_within_memory(
        plan.recipe,
        context,
        fresh_model=lambda tried: start_adapter(replace(loaded, model=tried.unload()), config, start)[0],
        lowered=lambda size: work.runs.set_micro_batch(run.id, size),
    )
    lineage = measured.pop("lineage", {})
    peak = peak_bytes(plan.device)
    metrics = {
        **run.metrics,
        **measured,
        **_summary(work.directory),
        "peak_bytes": peak,
        "predicted_bytes": plan.needed.total_bytes,
        "predicted_over_peak": round(plan.needed.total_bytes / peak, 3),
        "rows": len(prepared.examples),
        "replay": work.snapshot.manifest.get("replay", {}),
        "tokens": prepared.num_tokens,
        "dropped": dict(prepared.dropped),
        "rank": shape.rank,
        "learning_rate": config.learning_rate,
        "epochs": config.epochs,
        "attempts": run.attempt,
    }
    return _Trained(context.model, ChatTokens(loaded.tokenizer), metrics, lineage)


def _with_distance(work: _Work, plan: _Plan, trained: _Trained) -> _Trained:
    """With the candidate's KL divergence from the base. Raises when that is over the budget."""
    config = plan.config
    work.progress.say("measuring how far the candidate is from the base")
    divergence = kl.measure(
        trained.model,
        kl.heldout_prompts(work.snapshot.split("heldout"), trained.chat_tokens, max_length=config.max_length),
        stop_ids=trained.chat_tokens.stop_ids(),
        seed=config.seed,
        # Nobody lowers it here: memory that runs out now would cost the whole training.
        at_once=trained.metrics["micro_batch_size"],
    )
    metrics = {**trained.metrics, **(divergence.to_metrics() if divergence else {})}
    work.runs.note(work.run.id, metrics)  # also of a run that the budget ends
    kl.check_budget(divergence, config.kl_budget)
    return replace(trained, metrics=metrics)


def _publish(work: _Work, plan: _Plan, trained: _Trained) -> Version:
    """The candidate in the registry, with its lineage, and the run's success noted."""
    from scion_trainer.lora import export_adapter

    settings, run, snapshot = work.settings, work.run, work.snapshot
    export = export_adapter(
        trained.model,
        work.directory / "export",
        base_model=settings.base.model,
        lineage={
            "adapter": run.adapter,
            "base_fingerprint": work.base.fingerprint,
            "base_quantization": work.base.quantization,
            "parent": run.parent,
            "run": run.id,
            "snapshot": snapshot.id,
            "recipe": run.recipe,
            **trained.lineage,
        },
    )
    record_parity(
        trained.model,
        trained.chat_tokens,
        snapshot.split("heldout"),
        work.directory,
        max_length=plan.config.max_length,
    )
    work.stop_if_asked()
    version = work.registry.publish(
        run.adapter,
        export,
        parent=run.parent,
        base=work.base,
        limits=AdapterLimits(settings.server.max_lora_rank, settings.server.target_modules),
        actor=run.actor,
        reason=f"trained by {run.id}",
        recipe=run.recipe,
        run_id=run.id,
        snapshot_id=snapshot.id,
        metrics=trained.metrics,
    )
    work.runs.succeed(run.id, candidate=version.number, metrics=trained.metrics)
    return version


def _published(registry: Registry, run: Run) -> Version | None:
    return next((version for version in registry.versions(run.adapter) if version.run_id == run.id), None)


def _parent(registry: Registry, run: Run, base: BaseInfo, settings: Settings) -> Version | None:
    """The version to go on from (None: the base itself), if it belongs to this base."""
    if run.parent == BASE_NUMBER:
        return None
    version = registry.version(VersionRef(run.adapter, run.parent))
    if version.base_fingerprint != base.fingerprint:
        raise InvalidInputError(
            f"{version.ref} was trained on the base {version.base_fingerprint[:19]}…, and base.model = "
            f"{settings.base.model!r} is {base.fingerprint[:19]}…: point base.model at the base it was trained on, "
            "or give the new base an adapter of its own in [adapters]",
            field="base.model",
        )
    return version


def _snapshot(database: Database, store: ArtifactStore, run: Run, config: RunConfig) -> Snapshot:
    """The run's frozen ratings: made at the first attempt, read again by later ones."""
    if run.snapshot_id is not None:
        return load_snapshot(find_snapshot(database, run.snapshot_id).path)
    return build_snapshot(
        database,
        store.snapshots_path,
        adapter=run.adapter,
        heldout_share=config.heldout_share,
        red_team_share=config.red_team_share,
        replay_share=config.replay_share,
        seed=config.seed,
        newest_share=config.newest_share,
        max_age_days=config.max_age_days,
        since=config.since,
        min_ratings=config.min_ratings,
    )


def _choose(settings: Settings, runs: RunStore, run: Run, snapshot: Snapshot, base: BaseInfo) -> Run:
    """The run with the recipe that suits its ratings; from here on it is a run of that recipe, resumed or not."""
    counts = auto.count(snapshot.split("train"))
    choice = auto.choose(
        counts,
        newest_reward_model(runs.database, run.adapter, base.fingerprint) is not None,
        min_pairs=run.config["options"]["min_pairs"],
        ppo_min_ratings=run.config["options"]["ppo_min_ratings"],
    )
    config = run_config(settings, choice.recipe, since=run.config["since"])
    return runs.set_recipe(run.id, config, metrics=auto.note(choice, counts), why=choice.why)


def _summary(directory: Path) -> dict[str, Any]:
    """Figures of the whole run, earlier attempts included."""
    records = read_metrics(directory)
    losses = [record["loss"] for record in records if "loss" in record]
    return {
        "train_loss": round(sum(losses) / len(losses), 6) if losses else None,
        "seconds": round(sum(record["seconds"] for record in records), 3),
        "peak_rss_bytes": peak_bytes(),
        "curves": curves(records),
    }
