"""The gates, in the order in which they run: cheap ones first. A new gate is one file here and one entry below."""

from __future__ import annotations

from scion_trainer.gates.artifact import ArtifactGate
from scion_trainer.gates.behaviour import BehaviourGate
from scion_trainer.gates.heldout import HeldoutGate
from scion_trainer.gates.retention import RetentionGate
from scion_trainer.gates.types import Gate

GATES: tuple[Gate, ...] = (ArtifactGate(), RetentionGate(), HeldoutGate(), BehaviourGate())
