"""A reward model as a reward run leaves it, with untrained members: for tests of what comes after."""

from __future__ import annotations

from pathlib import Path

import torch

from scion_adapters.database import Database
from scion_adapters.fingerprint import base_info
from scion_adapters.records import Run
from scion_adapters.registry import open_registry
from scion_adapters.settings import Settings
from scion_trainer.base import load_base
from scion_trainer.config import run_config
from scion_trainer.lora import start_adapter
from scion_trainer.reward.calibration import Platt
from scion_trainer.reward.files import save_weights
from scion_trainer.reward.model import Head, RewardModel
from scion_trainer.reward.store import DIRECTORY, GATE_METRIC, write_reward_model
from scion_trainer.roles import Roles, reward_role
from scion_trainer.runs import RunStore

MEMBERS = 2


def add_reward_model(settings: Settings, database: Database, *, adapter: str = "chat", verdict: str = "pass") -> Path:
    """Its directory, after a run that succeeded with `verdict`; which answers it prefers is chance."""
    run = create_reward_run(settings, database, adapter)
    base, config = base_info(settings), run_config(settings, "reward")
    roles = Roles(start_adapter(load_base(settings, device=torch.device("cpu")), config, None)[0])
    torch.manual_seed(1)
    for member in range(MEMBERS):
        roles.add(reward_role(member))
    width = roles.model.get_input_embeddings().weight.shape[1]
    model = RewardModel(roles, [Head(width) for _ in range(MEMBERS)])
    directory = Path(run.directory) / DIRECTORY
    write_reward_model(
        directory,
        lambda target: save_weights(model, target),
        base_fingerprint=base.fingerprint,
        base_quantization=base.quantization,
        rank=config.rank,
        num_members=MEMBERS,
        disagreement_penalty=1.0,
        calibration=Platt(),
        gate={"verdict": verdict},
    )
    RunStore(database).succeed(run.id, candidate=None, metrics={GATE_METRIC: {"verdict": verdict}})
    return directory


def create_reward_run(settings: Settings, database: Database, adapter: str) -> Run:
    runs, registry = RunStore(database), open_registry(settings, database)
    registry.ensure_adapter(adapter)
    config = run_config(settings, "reward")
    run = runs.create(adapter, config, parent=0, directory=registry.store.runs_path, actor="test")
    return runs.start(run.id)
