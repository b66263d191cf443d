"""The gates' model server without vLLM: a quantized base and LoRA adapters in this process, asked by name.

Owns batching and which adapter is active. What only a serving engine can show (loading, parity with vLLM) it cannot.
Shapes: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from scion_trainer.chat_tokens import ChatTokens
from scion_trainer.server_client import Answer, Message, Scored

AT_ONCE = 64
MAX_LENGTH = 512


class LocalServer:
    """`ModelServer` over a PeftModel. `names` maps a model's name to its adapter's, or to None for the base."""

    def __init__(self, model: Any, tokenizer: Any, names: dict[str, str | None]) -> None:
        self.model, self.names = model, names
        self._tokenizer = tokenizer
        self._tokens = ChatTokens(tokenizer)

    def generate(
        self, model: str, messages_list: Sequence[Sequence[Message]], *, max_tokens: int, temperature: float, seed: int
    ) -> list[Answer]:
        prompts = [self._tokens.prompt(messages) for messages in messages_list]
        torch.manual_seed(seed)
        answers: list[Answer] = []
        with self.answering_as(model):
            for start in range(0, len(prompts), AT_ONCE):
                batch = prompts[start : start + AT_ONCE]
                longest = max(len(prompt) for prompt in batch)
                pad = self._tokenizer.pad_token_id
                ids_BT = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in batch])
                mask_BT = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in batch])
                with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
                    said_BT = self.model.generate(
                        input_ids=ids_BT,
                        attention_mask=mask_BT,
                        max_new_tokens=max_tokens,
                        do_sample=temperature > 0,
                        temperature=temperature or None,
                        top_k=0,
                        pad_token_id=pad,
                    )
                answers += [self._answer(row) for row in said_BT[:, longest:].tolist()]
        return answers

    def score(self, model: str, items: Sequence[Scored]) -> list[list[float]]:
        scores: list[list[float]] = [[]] * len(items)
        order = sorted(range(len(items)), key=lambda index: len(items[index][0]) + len(items[index][1]))
        with self.answering_as(model):
            for start in range(0, len(order), AT_ONCE):
                chosen = order[start : start + AT_ONCE]
                rows = [[*items[index][0], *items[index][1]] for index in chosen]
                longest = max(len(row) for row in rows)
                ids_BT = torch.tensor([row + [self._tokenizer.pad_token_id] * (longest - len(row)) for row in rows])
                with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
                    logits_BTV = self.model(input_ids=ids_BT).logits.float()
                logprobs_BT = logits_BTV[:, :-1].log_softmax(-1).gather(2, ids_BT[:, 1:, None])[..., 0]
                for place, index in enumerate(chosen):
                    prompt, answer = items[index]
                    scores[index] = logprobs_BT[place, len(prompt) - 1 : len(prompt) - 1 + len(answer)].tolist()
        return scores

    def max_length(self) -> int | None:
        return MAX_LENGTH

    @contextmanager
    def answering_as(self, model: str) -> Iterator[None]:
        adapter = self.names[model]
        self.model.eval()
        if adapter is None:
            with self.model.disable_adapter():
                yield
        else:
            self.model.set_adapter(adapter)
            yield

    def _answer(self, ids: list[int]) -> Answer:
        end = self._tokenizer.eos_token_id
        ended = end in ids
        said = ids[: ids.index(end)] if ended else ids
        text = self._tokenizer.decode(said, skip_special_tokens=True)
        return Answer(text, "stop" if ended else "length", len(said) + ended)
