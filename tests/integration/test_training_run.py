"""Whole runs on a tiny random base in NF4: ratings in the database in, a published candidate out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scion_adapters.errors import ConflictError, InvalidInputError, NotFoundError, ScionError
from scion_adapters.fingerprint import base_info
from scion_adapters.preflight import AdapterLimits, check_adapter
from scion_adapters.records import RunState, VersionRef, VersionState
from scion_adapters.registry import Registry, open_registry
from scion_adapters.sections.serving import LORA_TARGETS
from scion_adapters.settings import load_settings
from scion_feedback.snapshots import find_snapshot, load_snapshot
from scion_trainer import run as run_module
from scion_trainer.checkpoints import CHECKPOINTS, CorruptCheckpointError
from scion_trainer.execution import execute
from scion_trainer.launch import create_run
from scion_trainer.memory import OutOfMemoryError
from scion_trainer.progress import read_metrics
from scion_trainer.runs import RunStore
from scion_trainer.stopping import RunInterruptedError
from tests.helpers.tiny_model import build_tiny_model
from tests.helpers.training import Project, add_ratings, make_champion, make_project


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("bases") / "base")


@pytest.fixture
def project(tmp_path: Path, base: Path) -> Iterator[Project]:
    project = make_project(tmp_path, base=base)
    yield project
    project.database.dispose()


def registry_of(project: Project) -> Registry:
    return open_registry(project.settings, project.database)


def train(project: Project, recipe: str = "kto", **execution: Any) -> VersionRef:
    run = create_run(project.settings, project.database, "chat", recipe, actor="test")
    return execute(project.settings, project.database, run.id, **execution).ref


def test_ratings_become_a_candidate_that_the_server_can_load(project: Project) -> None:
    add_ratings(project.database, 40)
    ref = train(project)

    registry = registry_of(project)
    version = registry.version(ref)
    run = RunStore(project.database).get(version.run_id or "")
    assert (version.state, version.parent, version.recipe) == (VersionState.CANDIDATE, 0, "kto")
    assert (run.state, run.candidate, run.snapshot_id) == (RunState.SUCCEEDED, ref.number, version.snapshot_id)
    directory = Path(run.directory) / "export"
    info = check_adapter(directory, base_info(project.settings), AdapterLimits(16, LORA_TARGETS))
    assert (info.rank, len(info.modules)) == (4, 14)
    assert json.loads((directory / "scion.json").read_text()) == {
        "adapter": "chat",
        "base_fingerprint": base_info(project.settings).fingerprint,
        "base_quantization": project.settings.base.quantization,
        "parent": 0,
        "run": run.id,
        "snapshot": version.snapshot_id,
        "recipe": "kto",
    }
    metrics = run.metrics
    assert metrics["rows"] == metrics["liked"] + metrics["disliked"]
    assert metrics["steps"] == len(metrics["curves"]["step"]) > 0
    assert metrics["peak_rss_bytes"] > 0
    assert metrics["tokens"] > metrics["rows"]
    assert {"loss", "rewards/margins", "kl"} <= set(metrics["curves"])


def test_the_trainers_own_log_probs_are_kept_for_the_parity_gate(project: Project) -> None:
    """They are those of the exported files, on the held-out answers, and hold no text."""
    from peft import PeftModel

    from scion_trainer.base import load_base
    from scion_trainer.chat_tokens import ChatTokens
    from scion_trainer.parity import PARITY_FILE, comparable, read_parity, score

    add_ratings(project.database, 80)
    version = registry_of(project).version(train(project))
    run = RunStore(project.database).get(version.run_id or "")
    recorded = {record.key: record.logprobs for record in read_parity(Path(run.directory)) or ()}
    heldout = load_snapshot(find_snapshot(project.database, run.snapshot_id or "").path).split("heldout")
    assert set(recorded) == {row.feedback_id for row in heldout}
    assert not any(row.answer in Path(run.directory, PARITY_FILE).read_text() for row in heldout)

    loaded = load_base(project.settings)
    served = PeftModel.from_pretrained(loaded.model, str(registry_of(project).store.path(version.digest)))
    items = comparable(heldout, ChatTokens(loaded.tokenizer), max_length=256)
    deltas = [
        abs(a - b)
        for key, logprobs in zip(items, score(served, list(items.values())), strict=True)
        for a, b in zip(logprobs, recorded[key], strict=True)
    ]
    assert deltas
    assert sum(deltas) / len(deltas) < 0.01
    with served.disable_adapter():  # the base's own are others
        assert score(served, list(items.values()))[0] != pytest.approx(recorded[next(iter(items))], abs=0.01)


def test_the_files_are_bf16_and_name_no_path_of_this_machine(project: Project) -> None:
    from safetensors import safe_open

    add_ratings(project.database, 40)
    version = registry_of(project).version(train(project))
    directory = registry_of(project).store.path(version.digest)
    with safe_open(str(directory / "adapter_model.safetensors"), "pt") as file:
        dtypes = {str(file.get_tensor(name).dtype) for name in file.keys()}  # noqa: SIM118 - not a dict
    assert dtypes == {"torch.bfloat16"}
    config = json.loads((directory / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == project.settings.base.model
    assert config["target_modules"] == sorted(config["target_modules"])


def test_a_warm_start_begins_exactly_at_the_parent(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    """KTO's reference is the parent: before the first update all rewards and the KL are zero."""
    add_ratings(project.database, 40)
    first = train(project)
    make_champion(project, first)
    add_ratings(project.database, 40, number=first.number, seed=1, at=2_000_000.0)

    second = train(replace(project, settings=load_settings(project.file, overrides={"trainer": {"lora": {"rank": 2}}})))

    registry = registry_of(project)
    version = registry.version(second)
    assert version.parent == first.number
    records = read_metrics(Path(RunStore(project.database).get(version.run_id or "").directory))
    assert records[0]["rewards/chosen"] == records[0]["rewards/rejected"] == records[0]["kl"] == 0.0
    margins = [record["rewards/margins"] for record in records if "rewards/margins" in record]  # batches of both kinds
    assert margins[-1] != 0.0  # and it does learn
    assert version.rank == 4  # the parent's, not the settings' 2
    assert "rank 4 and alpha 8 are the parent's" in capsys.readouterr().err
    assert registry.version(first).digest != version.digest


def test_corrections_go_to_sft(project: Project) -> None:
    add_ratings(project.database, 40, liked_share=0.2, corrections=30)
    version = registry_of(project).version(train(project, "sft"))
    assert version.recipe == "sft"
    assert 20 <= version.metrics["rows"] <= 34  # 30 corrections and the liked rest, less the held-out users
    losses = version.metrics["curves"]["loss"]
    assert losses[-1] < losses[0]  # "so it is." is easily learnt


def test_training_again_publishes_once(project: Project) -> None:
    """Killed after the publication, before the run's row said so."""
    import sqlalchemy as sa

    from scion_adapters.tables import runs

    add_ratings(project.database, 40)
    ref = train(project)
    run_id = registry_of(project).version(ref).run_id or ""
    with project.database.write() as connection:
        connection.execute(sa.update(runs).where(runs.c.id == run_id).values(state="running", candidate=None))
    assert execute(project.settings, project.database, run_id).ref == ref
    assert len(registry_of(project).versions("chat")) == 1
    assert RunStore(project.database).get(run_id).candidate == ref.number


def test_a_stopped_run_goes_on_where_it_stopped(project: Project) -> None:
    add_ratings(project.database, 40)
    run = create_run(project.settings, project.database, "chat", "kto", actor="test")
    directory = Path(run.directory)
    with pytest.raises(RunInterruptedError, match="stopped at step 4"):
        execute(project.settings, project.database, run.id, stop_requested=lambda: len(read_metrics(directory)) >= 3)
    version = execute(project.settings, project.database, run.id)
    assert version.metrics["attempts"] == 2
    steps = [json.loads(line)["step"] for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, version.metrics["steps"] + 1))  # none was done twice


@pytest.mark.parametrize(
    ("ratings", "liked_share", "said"),
    [
        (5, 0.5, "8 are needed"),  # too few: the numbers and the setting
        (40, 1.0, "kto needs dislikes"),  # only likes
        (40, 0.0, "kto needs likes"),  # only dislikes
    ],
)
def test_unusable_ratings_are_refused_before_the_base_is_loaded(
    project: Project, monkeypatch: pytest.MonkeyPatch, ratings: int, liked_share: float, said: str
) -> None:
    monkeypatch.setattr("scion_trainer.base.load_base", lambda *_: pytest.fail("the base was loaded"))
    add_ratings(project.database, ratings, liked_share=liked_share)
    with pytest.raises(InvalidInputError, match=said):
        train(project)


def test_rows_that_are_too_long_are_left_out_and_counted(project: Project) -> None:
    add_ratings(project.database, 40)
    short = load_settings(project.file, overrides={"trainer": {"max_length": 16, "min_ratings": 2}})
    with pytest.raises(InvalidInputError, match="0 usable ratings"):
        train(replace(project, settings=short))


def test_another_base_is_refused(project: Project, tmp_path: Path) -> None:
    add_ratings(project.database, 40)
    make_champion(project, train(project))
    other = build_tiny_model(tmp_path / "other", seed=1)
    moved = replace(project, settings=load_settings(project.file, overrides={"base": {"model": str(other)}}))
    with pytest.raises(InvalidInputError, match=r"chat:1 was trained on the base sha256:.*point base\.model"):
        train(moved)


def test_too_little_memory_is_refused_before_the_base_is_loaded(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scion_trainer.base.load_base", lambda *_: pytest.fail("the base was loaded"))
    monkeypatch.setattr("scion_trainer.estimation.available_bytes", lambda _device: 100 << 20)
    add_ratings(project.database, 40)
    with pytest.raises(OutOfMemoryError, match=r"needs about .*0\.10 GiB are available.*micro_batch_size"):
        train(project)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),  # Python's own
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"
        ),  # torch
    ],
)
def test_memory_that_runs_out_while_training_is_reported_as_that(
    project: Project, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def out_of_memory(*_: object) -> None:
        raise error

    monkeypatch.setattr("scion_trainer.base.load_base", out_of_memory)
    add_ratings(project.database, 40)
    run = create_run(project.settings, project.database, "chat", "kto", actor="test")
    status = run_module._attempt(project.settings, project.database, run, lambda: False)
    failed = RunStore(project.database).get(run.id)
    assert (status, failed.state) == (OutOfMemoryError.exit_code, RunState.FAILED)
    assert "memory ran out" in (failed.error or "")
    assert "trainer.micro_batch_size" in (failed.error or "")


def test_a_loss_that_is_not_a_number_publishes_nothing(project: Project) -> None:
    add_ratings(project.database, 40)
    mad = load_settings(project.file, overrides={"trainer": {"kto": {"learning_rate": 1e30}}})
    with pytest.raises(ScionError, match=r"diverged.*learning_rate"):
        train(replace(project, settings=mad))
    assert registry_of(project).versions("chat") == []


def stop_with_checkpoints(project: Project) -> str:
    run = create_run(project.settings, project.database, "chat", "kto", actor="test")
    directory = Path(run.directory)
    with pytest.raises(RunInterruptedError):
        execute(project.settings, project.database, run.id, stop_requested=lambda: len(read_metrics(directory)) >= 6)
    return run.id


def test_a_damaged_checkpoint_is_passed_over(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    add_ratings(project.database, 40)
    run_id = stop_with_checkpoints(project)
    checkpoints = Path(RunStore(project.database).get(run_id).directory) / CHECKPOINTS
    (checkpoints / "checkpoint-7" / "optimizer.pt").write_bytes(b"not what was written")
    version = execute(project.settings, project.database, run_id)
    assert version.metrics["attempts"] == 2
    said = capsys.readouterr().err
    assert "checkpoint-7 is damaged (optimizer.pt has changed) and is not used" in said
    assert f"resuming {run_id} at step 6" in said


def test_a_run_whose_checkpoints_are_all_damaged_fails_with_the_remedy(project: Project) -> None:
    add_ratings(project.database, 40)
    run_id = stop_with_checkpoints(project)
    for weights in Path(RunStore(project.database).get(run_id).directory).glob(
        "checkpoints/*/adapter_model.safetensors"
    ):
        weights.write_bytes(b"not what was written")
    with pytest.raises(CorruptCheckpointError, match="without --resume"):
        execute(project.settings, project.database, run_id)


def test_an_adapter_that_is_not_configured_is_said_so(project: Project) -> None:
    with pytest.raises(NotFoundError, match=r"'nope' is not configured.*chat"):
        create_run(project.settings, project.database, "nope", "kto", actor="test")


def test_a_second_run_of_an_adapter_is_refused_while_one_works(project: Project) -> None:
    from scion_trainer.run_lease import Holder, claim

    claim(project.database, "chat", Holder.of("run-first"))
    with pytest.raises(ConflictError, match="chat is being trained by run-first"):
        create_run(project.settings, project.database, "chat", "kto", actor="test")
    assert RunStore(project.database).list() == []  # nothing is left behind
