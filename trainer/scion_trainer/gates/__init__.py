"""The gates, in the order in which they run: cheap ones first. A new gate is one file here and one entry below."""

from __future__ import annotations

from scion_trainer.gates.artifact import ArtifactGate
from scion_trainer.gates.baseline import BaselineGate
from scion_trainer.gates.behaviour import BehaviourGate
from scion_trainer.gates.drift import DriftGate
from scion_trainer.gates.forgetting import ForgettingGate
from scion_trainer.gates.heldout import HeldoutGate
from scion_trainer.gates.kl import KlGate
from scion_trainer.gates.lm_eval import LmEvalGate
from scion_trainer.gates.parity import ParityGate
from scion_trainer.gates.red_team import RedTeamGate
from scion_trainer.gates.retention import RetentionGate
from scion_trainer.gates.sycophancy import SycophancyGate
from scion_trainer.gates.types import Gate
from scion_trainer.gates.winrate import WinRateGate

GATES: tuple[Gate, ...] = (
    ArtifactGate(),
    KlGate(),
    ParityGate(),
    RetentionGate(),
    ForgettingGate(),
    HeldoutGate(),
    BaselineGate(),
    BehaviourGate(),
    DriftGate(),
    WinRateGate(),
    SycophancyGate(),
    RedTeamGate(),
    LmEvalGate(),
)
