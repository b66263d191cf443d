"""Several models on one quantized base: policy, reference, value and reward members are LoRA adapters that take turns.

Owns which role is active, what may receive gradients, and the refusal of a backward under another role than its
forward's. It knows nothing of losses. Shapes: B sequences, T tokens, D hidden size.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer

from scion_adapters.errors import ScionError
from scion_trainer.lora import ADAPTER

POLICY = "policy"
REFERENCE = "reference"
VALUE = "value-role"
"""Not plain "value": PEFT drops weights whose name contains another adapter's, and some bases name modules so."""
BASE = "base"
"""No adapter at all: the pinned base."""


class RoleError(ScionError, RuntimeError):
    """A role was used in a way that would give wrong numbers without an error."""


def reward_role(member: int) -> str:
    """The name of a member of the reward ensemble."""
    return f"reward-{member}"


class Roles:
    """The roles on one PeftModel. It begins with `policy`, the adapter that the model came with, and `base`."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._adapters: dict[str, str | None] = {POLICY: ADAPTER, BASE: None}
        self._active, self._trains = POLICY, True
        self._dropout = True
        self._turn = 0
        self._layers: list[Any] = []
        self._parameters: dict[str, list[torch.nn.Parameter]] = {}
        self._survey()
        self._decoder = model.get_base_model().get_decoder()
        _watch(self._decoder, self)

    def __contains__(self, role: str) -> bool:
        return role in self._adapters

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.device
        return device

    def add(self, role: str, *, like: str = POLICY, directory: Path | None = None) -> None:
        """A new role with the weights in `directory` (PEFT format), or else a fresh LoRA shaped as `like`'s.

        A fresh LoRA changes nothing until it is trained. Weights are held in fp32.
        """
        if role in self._adapters:
            raise RoleError(f"role {role!r} is there already: remove it first")
        if directory is None:
            shape = self.model.peft_config[self._adapter(like)].to_dict()
            self.model.add_adapter(role, LoraConfig(**{**shape, "inference_mode": False}))
        else:
            self.model.load_adapter(str(directory), role, is_trainable=False, torch_device=str(self.device))
        self._adapters[role] = role
        self._survey()
        for parameter in self.parameters(role):
            parameter.data = parameter.data.float()
        if not self._dropout:
            self.without_dropout()
        self._switch(self._active, self._trains)  # PEFT leaves its own idea of what is trainable

    def add_copy(self, role: str, source: str) -> None:
        """A new role with a copy of the weights of `source`."""
        self.add(role, like=source)
        self.load_state(role, self.state(source))

    def add_frozen_start(self, role: str = REFERENCE) -> None:
        """`role` is the policy as it is now. When that changes nothing, it is the base, and takes no memory."""
        if self.changes_nothing(POLICY):
            self._adapters[role] = None
            self._survey()
        else:
            self.add_copy(role, POLICY)

    def remove(self, role: str) -> None:
        """Free a role that is not active."""
        if role in (POLICY, self._active):
            raise RoleError(f"role {role!r} cannot be removed: it is in use")
        if (adapter := self._adapters.pop(role)) is not None:
            self.model.delete_adapter(adapter)
        self._survey()
        self._switch(self._active, self._trains)

    def changes_nothing(self, role: str) -> bool:
        """Whether the role's answers are the base's own: every LoRA's B is zero."""
        return all(not tensor.any() for name, tensor in self.state(role).items() if "lora_B" in name)

    def parameters(self, role: str) -> list[torch.nn.Parameter]:
        """The role's weights, in a fixed order. Empty for a role without an adapter."""
        return list(self._parameters[role])

    def state(self, role: str) -> dict[str, torch.Tensor]:
        """A copy of the role's weights on the CPU, by PEFT's names."""
        found = get_peft_model_state_dict(self.model, adapter_name=self._adapter(role), save_embedding_layers=False)
        return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in found.items()}

    def load_state(self, role: str, state: Mapping[str, torch.Tensor]) -> None:
        """The inverse of `state`. Raises RoleError when `state` is of another shape of adapter."""
        expected = self.state(role)
        if {n: t.shape for n, t in state.items()} != {n: t.shape for n, t in expected.items()}:
            raise RoleError(f"role {role!r} has {len(expected)} tensors, and {len(state)} of other shapes were given")
        set_peft_model_state_dict(self.model, dict(state), adapter_name=self._adapter(role))

    @contextlib.contextmanager
    def use(self, role: str, *, train: bool = False) -> Iterator[Any]:
        """Inside, the model answers as `role`; with `train`, the role's weights receive gradients, and no others do.

        The backward of what was computed inside must run inside, before the next switch: it raises RoleError
        otherwise. PEFT would give no gradients then, or with gradient checkpointing those of another role.
        """
        if role not in self._adapters:
            raise RoleError(f"there is no role {role!r}: there are {', '.join(sorted(self._adapters))}")
        if train and self._adapters[role] is None:
            raise RoleError(f"role {role!r} is the frozen base and cannot be trained")
        previous, trained, mode = self._active, self._trains, self.model.training
        self._switch(role, train)
        self._set_mode(train)
        try:
            yield self.model
        finally:
            self._switch(previous, trained)
            self._set_mode(mode)

    def hidden(self, tokens_BT: torch.Tensor, mask_BT: torch.Tensor | None = None) -> torch.Tensor:
        """Last hidden states (B, T, D) of the active role, under bf16 autocast.

        Without a mask the rows must be padded on the right; what stands at padded positions then means nothing.
        """
        positions_BT = None if mask_BT is None else (mask_BT.long().cumsum(dim=1) - 1).clamp(min=0)
        with torch.autocast(tokens_BT.device.type, dtype=torch.bfloat16):
            output = self._decoder(
                input_ids=tokens_BT, attention_mask=mask_BT, position_ids=positions_BT, use_cache=False
            )
        hidden_BTD: torch.Tensor = output.last_hidden_state
        return hidden_BTD

    def without_dropout(self) -> None:
        """Switch dropout off in every role, later ones too: PPO's ratio is 1 before the first update only then."""
        self._dropout = False
        for module in self.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0

    def checkpoint_activations(self) -> None:
        """Recompute activations in the backward instead of keeping them; it works in training mode only."""
        self.model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})

    def _adapter(self, role: str) -> str:
        adapter = self._adapters.get(role)
        if adapter is None:
            raise RoleError(f"role {role!r} has no adapter of its own: it is the base, or was never added")
        return adapter

    def _switch(self, role: str, train: bool) -> None:
        """As PEFT's set_adapter and disable_adapter_layers, without walking over all modules: PPO switches often."""
        adapter = self._adapters[role]
        self._turn += 1
        self._active, self._trains = role, train
        for layer in self._layers:
            if layer.disable_adapters is not (adapter is None):
                layer.enable_adapters(adapter is not None)  # makes what was active trainable, so it comes first
            if adapter is not None:
                layer.set_adapter([adapter], inference_mode=not train)
        if adapter is not None:
            self.model.active_adapter = self.model.base_model.active_adapter = adapter

    def _set_mode(self, train: bool) -> None:
        if self.model.training is not train:
            self.model.train(train)

    def _survey(self) -> None:
        """Note which layers have adapters, and which weights each role has. Roles come and go rarely."""
        self._layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        named = list(self.model.named_parameters())
        self._parameters = {
            role: [] if adapter is None else [p for name, p in named if _belongs(name, adapter)]
            for role, adapter in self._adapters.items()
        }

    def guard(self, hidden_BTD: torch.Tensor) -> None:
        """Tie the backward of a forward of the decoder to the turn that it ran in. The decoder's hook calls it."""
        if not hidden_BTD.requires_grad:
            return
        turn, role = self._turn, self._active

        def check(_gradient: torch.Tensor) -> None:
            if self._turn != turn:
                raise RoleError(
                    f"backward of role {role!r} after a switch (now {self._active!r}): its gradients would be missing "
                    "or another role's; call backward() inside the `with roles.use(...)` of its forward"
                )

        hidden_BTD.register_hook(check)


def _watch(decoder: Any, roles: Roles) -> None:
    """Show every forward of `decoder` to `roles` for as long as these are in use.

    The decoder is the base's and outlives them: a hook that held them would keep their weights and gradients, too.
    """
    watching = weakref.ref(roles)

    def hook(_module: Any, _arguments: Any, output: Any) -> None:
        if (found := watching()) is not None:
            found.guard(output[0])

    weakref.finalize(roles, decoder.register_forward_hook(hook).remove)


def _belongs(parameter: str, adapter: str) -> bool:
    """Whether a name such as `….q_proj.lora_A.reward-0.weight` is of `adapter`."""
    parts = parameter.split(".")
    return any(part.startswith("lora_") and after == adapter for part, after in itertools.pairwise(parts))
