"""Candidates for the gates benchmark: LoRA adapters on one base, trained for seconds by plain supervised steps.

Owns the training and the files. It knows nothing of gates. Shapes: B sequences, T tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file

from scion_adapters.sections.serving import LORA_TARGETS
from scion_feedback.selection import SnapshotRow
from scion_trainer import kl
from scion_trainer.base import LoadedBase
from scion_trainer.chat_tokens import ChatTokens
from scion_trainer.lora import ADAPTER, export_adapter
from tests.bench.gates_server import LocalServer
from tests.bench.gates_world import Lesson

IGNORED = -100


class Trainee:
    """A base with one adapter for each candidate. `names` maps candidates to adapters."""

    def __init__(self, base: LoadedBase, *, rank: int) -> None:
        self.tokenizer = base.tokenizer
        self.names: dict[str, str | None] = {"base": None}
        self._shape = LoraConfig(
            task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=list(LORA_TARGETS)
        )
        self.model: Any = get_peft_model(base.model, self._shape, adapter_name=ADAPTER)
        self._tokens = ChatTokens(base.tokenizer)

    def server(self) -> LocalServer:
        return LocalServer(self.model, self.tokenizer, self.names)

    def train(
        self, name: str, lessons: Sequence[Lesson], *, seed: int, num_steps: int, batch_size: int, learning_rate: float
    ) -> None:
        """A fresh adapter, by Adam with a falling rate on the answers' tokens."""
        torch.manual_seed(seed)
        adapter = self._add(name)
        self.model.set_adapter(adapter)
        weights = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(weights, lr=learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / num_steps)
        rng = random.Random(f"steps {seed}")
        self.model.train()
        for _ in range(num_steps):
            ids_BT, labels_BT = self._batch(rng.sample(list(lessons), batch_size))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = self.model(input_ids=ids_BT, labels=labels_BT).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

    def weaken(self, source: str, name: str, factor: float) -> None:
        """A copy of an adapter with its effect times `factor`."""
        adapter = self._add(name)
        state = get_peft_model_state_dict(self.model, adapter_name=self._adapter(source))
        scaled = {key: tensor * (factor if "lora_B" in key else 1.0) for key, tensor in state.items()}
        set_peft_model_state_dict(self.model, scaled, adapter_name=adapter)

    def export(self, name: str, directory: Path) -> None:
        """Files as a run makes them."""
        export_adapter(self.model, directory, base_model="base", lineage={})
        state = get_peft_model_state_dict(self.model, adapter_name=self._adapter(name), save_embedding_layers=False)
        tensors = {key: tensor.detach().to(torch.bfloat16).contiguous() for key, tensor in state.items()}
        save_file(tensors, str(directory / "adapter_model.safetensors"), metadata={"format": "pt"})

    def divergence(self, name: str, rows: Sequence[SnapshotRow]) -> float:
        """KL(candidate || base) per token, as a run measures it."""
        state = get_peft_model_state_dict(self.model, adapter_name=self._adapter(name), save_embedding_layers=False)
        set_peft_model_state_dict(self.model, state, adapter_name=ADAPTER)  # what a run has trained has this name
        self.model.set_adapter(ADAPTER)
        prompts = kl.heldout_prompts(rows, self._tokens, max_length=256)
        found = kl.measure(self.model, prompts, stop_ids=self._tokens.stop_ids())
        assert found is not None
        return found.per_token

    def _add(self, name: str) -> str:
        adapter = f"candidate_{len(self.names)}"
        self.model.add_adapter(adapter, self._shape)
        for parameter in self.model.parameters():
            if parameter.dtype == torch.bfloat16 and parameter.requires_grad:
                parameter.data = parameter.data.float()
        self.names[name] = adapter
        return adapter

    def _adapter(self, name: str) -> str:
        adapter = self.names[name]
        assert adapter is not None, f"{name} is the base"
        return adapter

    def _batch(self, lessons: Sequence[Lesson]) -> tuple[torch.Tensor, torch.Tensor]:
        pairs = [(self._tokens.prompt(lesson.messages), self._tokens.answer(lesson.answer)) for lesson in lessons]
        longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
        pad = self.tokenizer.pad_token_id
        ids, labels = [], []
        for prompt, answer in pairs:
            rest = longest - len(prompt) - len(answer)
            ids.append([*prompt, *answer, *[pad] * rest])
            labels.append([*[IGNORED] * len(prompt), *answer, *[IGNORED] * rest])
        return torch.tensor(ids), torch.tensor(labels)
