"""One run in a process of its own: `python -m scion_trainer.run RUN_ID`. The same command again resumes it.

The story: snapshot, parent, examples, memory, base, training with checkpoints, export, publication. Nothing heavy is
imported before the process is bound to its cores and threads, because torch reads them once. Exit status: 0 published,
75 stopped and resumable, otherwise the error's own.
"""

from __future__ import annotations

import logging
import os
import resource
import sys
from collections.abc import Callable
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
from scion_trainer.checkpoints import CHECKPOINTS, newest_complete
from scion_trainer.config import RunConfig
from scion_trainer.defaults import resolve
from scion_trainer.limits import bind_process, quiet_libraries
from scion_trainer.memory import Estimate, OutOfMemoryError, available_bytes, check_fits, estimate, gib
from scion_trainer.progress import Progress, curves, read_metrics
from scion_trainer.recipes import RECIPES, RunContext
from scion_trainer.recipes.batches import micro_batches
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
) -> Version:
    """Do the run, or the rest of it, and return the version that it published."""
    runs = RunStore(database)
    registry = open_registry(settings, database)
    run = runs.start(run_id)
    config = RunConfig.from_json(run.config)
    recipe = RECIPES[run.recipe]
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
        found = newest_complete(directory / CHECKPOINTS)
        for note in found.notes:
            progress.say(note)
        if found.path is not None:
            progress.say(f"resuming {run_id} at step {found.step}")

        from scion_trainer.base import default_device, load_base, load_tokenizer
        from scion_trainer.examples import prepare
        from scion_trainer.lora import export_adapter, start_adapter

        prepared = prepare(
            recipe.examples(snapshot.split("train")), load_tokenizer(settings), max_length=config.max_length
        )
        recipe.check(list(prepared.examples), config)
        config = resolve(
            config, base, num_examples=len(prepared.examples), mean_answer_tokens=prepared.mean_answer_tokens
        )
        rank = config.rank if parent is None else parent.rank
        needed = _memory(settings, config, base, rank, prepared.longest_tokens, default_device().type)
        _stop_if(stop_requested)
        progress.say(
            f"training {run.adapter} by {run.recipe} on {len(prepared.examples)} examples from "
            f"{VersionRef(run.adapter, run.parent)}; needs about {gib(needed.total_bytes)}"
        )
        loaded = load_base(settings)
        model, shape = start_adapter(loaded, config, registry.store.path(parent.digest) if parent else None)
        if shape.note:
            progress.say(shape.note)
        _stop_if(stop_requested)
        measured = recipe.train(
            RunContext(
                config=config,
                model=model,
                tokenizer=loaded.tokenizer,
                examples=prepared.examples,
                directory=directory,
                resume_from=found.path,
                gradient_checkpointing=needed.gradient_checkpointing,
                progress=progress,
                stop_requested=stop_requested,
            )
        )
        metrics = {
            **measured,
            **_summary(directory),
            "rows": len(prepared.examples),
            "tokens": prepared.num_tokens,
            "dropped": dict(prepared.dropped),
            "rank": shape.rank,
            "learning_rate": config.learning_rate,
            "epochs": config.epochs,
            **({"beta": config.beta} if run.recipe == "kto" else {}),
            "predicted_bytes": needed.total_bytes,
            "attempts": run.attempt,
        }
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
            },
        )
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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, the CPU allocator or CUDA ran out of memory."""
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or ("DefaultCPUAllocator" in text and "allocate memory" in text)
    )


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
        max_age_days=config.max_age_days,
        since=config.since,
        min_ratings=config.min_ratings,
    )


def _memory(
    settings: Settings, config: RunConfig, base: BaseInfo, rank: int, longest_tokens: int, device_type: str
) -> Estimate:
    micro, _ = micro_batches(config.batch_size, config.micro_batch_size)
    predicted = estimate(
        base,
        config,
        quantized=settings.base.quantization == "nf4",
        rank=rank,
        micro_batch_size=micro,
        longest_tokens=longest_tokens,
    )
    check_fits(predicted, available_bytes(device_type), micro_batch_size=micro, longest_tokens=longest_tokens)
    return predicted


def _summary(directory: Path) -> dict[str, Any]:
    """Figures of the whole run, earlier attempts included."""
    records = read_metrics(directory)
    losses = [record["loss"] for record in records if "loss" in record]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "train_loss": round(sum(losses) / len(losses), 6) if losses else None,
        "seconds": round(sum(record["seconds"] for record in records), 3),
        "peak_rss_bytes": peak,
        "curves": curves(records),
    }


def _stop_if(stop_requested: Callable[[], bool]) -> None:
    if stop_requested():
        raise RunInterruptedError("stopped before its end")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
