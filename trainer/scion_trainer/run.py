"""One run in a process of its own: `python -m scion_trainer.run RUN_ID`. The same command again resumes it.

The story: snapshot, parent, examples, memory, base, training with checkpoints, export, publication. Nothing heavy is
imported before the process is bound to its cores and threads, because torch reads them once. Exit status: 0 published,
75 stopped and resumable, otherwise the error's own.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from scion_adapters.artifacts import ArtifactStore
from scion_adapters.database import Database, open_database
from scion_adapters.errors import InvalidInputError, ScionError, UnavailableError
from scion_adapters.fingerprint import BaseInfo, base_info
from scion_adapters.leases import HeldLease
from scion_adapters.preflight import AdapterLimits
from scion_adapters.records import BASE_NUMBER, Run, Version, VersionRef
from scion_adapters.registry import Registry, open_registry
from scion_adapters.settings import Settings, load_settings
from scion_feedback.snapshots import Snapshot, build_snapshot, find_snapshot, load_snapshot
from scion_trainer import kl
from scion_trainer.chat_tokens import ChatTokens
from scion_trainer.checkpoints import CHECKPOINTS, newest_complete
from scion_trainer.config import RunConfig, run_config
from scion_trainer.defaults import resolve
from scion_trainer.estimation import Request, ensure_fits
from scion_trainer.limits import bind_process, quiet_libraries
from scion_trainer.lowering import is_out_of_memory, train_within_memory
from scion_trainer.memory import OutOfMemoryError, gib, peak_bytes
from scion_trainer.parity import record_parity
from scion_trainer.progress import Progress, curves, read_metrics
from scion_trainer.recipes import RECIPES, RunContext, auto
from scion_trainer.recipes.auto import AUTO
from scion_trainer.reward.store import newest_reward_model, pinned_reward_model
from scion_trainer.run_lease import LEASE_TTL_S, Holder, claim, hand_over, lease_name
from scion_trainer.runs import RunStore
from scion_trainer.stopping import RunInterruptedError, StopRequest

HOLDER_ENV = "SCION_RUN_HOLDER"
"""Set by the process that created the run: the holder that passes the lease on to this process."""

logger = logging.getLogger(__name__)


def main(argv: list[str]) -> int:
    """Execute the run that the arguments name; returns the exit status."""
    if len(argv) != 2:
        sys.stderr.write("usage: python -m scion_trainer.run RUN_ID\n")
        return InvalidInputError.exit_code
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # warns of kernels that we do not use
    quiet_libraries()
    run_id = argv[1]
    stop = StopRequest()
    stop.install()
    try:
        settings = load_settings()
        bind_process(settings.trainer.cores, settings.trainer.threads)
        database = open_database(settings)
        run = RunStore(database).get(run_id)
        holder = Holder.of(run_id)
        giver = os.environ.pop(HOLDER_ENV, "")
        if not (giver and hand_over(database, run.adapter, giver, holder)):
            claim(database, run.adapter, holder)
        with HeldLease(database, lease_name(run.adapter), str(holder), ttl_s=LEASE_TTL_S) as lease:
            return _attempt(settings, database, run, lambda: stop.is_set() or lease.lost.is_set())
    except ScionError as error:
        sys.stderr.write(f"{run_id}: {error}\n")
        return error.exit_code


def _attempt(settings: Settings, database: Database, run: Run, stop_requested: Callable[[], bool]) -> int:
    """Execute the run and write down how that ended."""
    runs = RunStore(database)
    try:
        execute(settings, database, run.id, stop_requested=stop_requested)
    except OutOfMemoryError as error:
        runs.fail(run.id, str(error))
        return error.exit_code
    except (RunInterruptedError, UnavailableError) as error:  # nothing is wrong with the run: it can go on later
        runs.interrupt(run.id, str(error))
        return error.exit_code
    except ScionError as error:
        runs.fail(run.id, str(error))
        return error.exit_code
    except Exception as error:
        if is_out_of_memory(error):
            shortage = OutOfMemoryError(
                f"memory ran out ({type(error).__name__}: {str(error)[:200]}): "
                "lower trainer.micro_batch_size or trainer.max_length, and start a new run"
            )
            runs.fail(run.id, str(shortage))
            return shortage.exit_code
        logger.exception("run %s failed", run.id)
        runs.fail(run.id, f"{type(error).__name__}: {error}")
        return ScionError.exit_code
    return 0


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
    config = RunConfig.from_json(run.config)
    directory = Path(run.directory)
    directory.mkdir(parents=True, exist_ok=True)
    registry.ensure_adapter(run.adapter)
    if published := _published(registry, run):  # killed between publication and the note of it
        runs.succeed(run_id, candidate=published.number, metrics=published.metrics)
        return published

    with Progress(directory) as progress:
        base = base_info(settings)
        parent = _parent(registry, run, base, settings)
        snapshot = _snapshot(database, registry.store, run, config)
        runs.set_snapshot(run_id, snapshot.id)
        if run.recipe == AUTO:
            run = _choose(settings, runs, run, snapshot, base)
            config = RunConfig.from_json(run.config)
            progress.say(f"recipe {run.recipe}: {run.metrics['chosen_why']}")
        recipe = RECIPES[run.recipe]
        found = newest_complete(directory / CHECKPOINTS)
        for note in found.notes:
            progress.say(note)
        if found.path is not None:
            progress.say(f"resuming {run_id} at step {found.step}")

        from scion_trainer.base import default_device, load_base, load_tokenizer
        from scion_trainer.examples import prepare
        from scion_trainer.lora import export_adapter, start_adapter

        tokenizer = load_tokenizer(settings)
        prepared = prepare(recipe.examples(snapshot.split("train")), tokenizer, max_length=config.max_length)
        heldout = prepare(recipe.examples(snapshot.split("heldout")), tokenizer, max_length=config.max_length)
        recipe.check(list(prepared.examples), config)
        reward_model = newest_reward_model(database, run.adapter, base.fingerprint)
        if recipe.needs_reward_model:
            reward_model = pinned_reward_model(directory, reward_model)
        config = resolve(
            config, base, num_examples=len(prepared.examples), mean_answer_tokens=prepared.mean_answer_tokens
        )
        rank = config.rank if parent is None else parent.rank
        device = default_device().type
        needed = ensure_fits(
            Request(
                base,
                config,
                quantized=settings.base.quantization == "nf4",
                rank=rank,
                longest_tokens=prepared.longest_tokens,
                has_parent=parent is not None,
            ),
            device,
        )
        _stop_if(stop_requested)
        progress.say(
            f"training {run.adapter} by {run.recipe} on {len(prepared.examples)} examples from "
            f"{VersionRef(run.adapter, run.parent)}; needs about {gib(needed.total_bytes)}"
        )
        loaded = load_base(settings)
        start = registry.store.path(parent.digest) if parent else None
        model, shape = start_adapter(loaded, config, start)
        if shape.note:
            progress.say(shape.note)
        chat_tokens = ChatTokens(loaded.tokenizer)
        _stop_if(stop_requested)
        context = RunContext(
            config=config,
            model=model,
            tokenizer=loaded.tokenizer,
            examples=prepared.examples,
            directory=directory,
            resume_from=found.path,
            gradient_checkpointing=needed.gradient_checkpointing,
            progress=progress,
            stop_requested=stop_requested,
            heldout=heldout.examples,
            base=base,
            reward_model=reward_model,
            settings=settings,
            registry=registry,
        )
        del model  # a try that ran out of memory must leave nothing behind
        context, measured = train_within_memory(
            recipe,
            context,
            fresh_model=lambda tried: start_adapter(replace(loaded, model=tried.unload()), config, start)[0],
            lowered=lambda size: runs.set_micro_batch(run_id, size),
        )
        model = context.model
        lineage = measured.pop("lineage", {})
        metrics = {
            **run.metrics,
            **measured,
            **_summary(directory),
            "peak_bytes": (peak := peak_bytes(device)),
            "predicted_over_peak": round(needed.total_bytes / peak, 3),
            "rows": len(prepared.examples),
            "replay": snapshot.manifest.get("replay", {}),
            "tokens": prepared.num_tokens,
            "dropped": dict(prepared.dropped),
            "rank": shape.rank,
            "learning_rate": config.learning_rate,
            "epochs": config.epochs,
            "predicted_bytes": needed.total_bytes,
            "attempts": run.attempt,
        }
        if recipe.makes_version:
            progress.say("measuring how far the candidate is from the base")
            divergence = kl.measure(
                model,
                kl.heldout_prompts(snapshot.split("heldout"), chat_tokens, max_length=config.max_length),
                stop_ids=chat_tokens.stop_ids(),
                seed=config.seed,
            )
            metrics.update(divergence.to_metrics() if divergence else {})
            runs.note(run_id, metrics)  # also of a run that the budget ends
            kl.check_budget(divergence, config.kl_budget)
        if not recipe.makes_version:
            runs.succeed(run_id, candidate=None, metrics=metrics)
            return None
        export = export_adapter(
            model,
            directory / "export",
            base_model=settings.base.model,
            lineage={
                "adapter": run.adapter,
                "base_fingerprint": base.fingerprint,
                "base_quantization": base.quantization,
                "parent": run.parent,
                "run": run_id,
                "snapshot": snapshot.id,
                "recipe": run.recipe,
                **lineage,
            },
        )
        record_parity(model, chat_tokens, snapshot.split("heldout"), directory, max_length=config.max_length)
        _stop_if(stop_requested)
        version = registry.publish(
            run.adapter,
            export,
            parent=run.parent,
            base=base,
            limits=AdapterLimits(settings.server.max_lora_rank, settings.server.target_modules),
            actor=run.actor,
            reason=f"trained by {run_id}",
            recipe=run.recipe,
            run_id=run_id,
            snapshot_id=snapshot.id,
            metrics=metrics,
        )
        runs.succeed(run_id, candidate=version.number, metrics=metrics)
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


def _stop_if(stop_requested: Callable[[], bool]) -> None:
    if stop_requested():
        raise RunInterruptedError("stopped before its end")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
