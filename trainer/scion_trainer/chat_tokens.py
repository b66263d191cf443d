"""From messages to token ids, exactly as the server and the recipes see them.

Owns how a chat becomes the prompt's and the answer's tokens. It knows nothing of models, servers or snapshots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scion_adapters.errors import InvalidInputError
from scion_adapters.settings import Settings

Message = Mapping[str, Any]
_PROBE = "x"


class ChatTokens:
    """Renders chats with a tokenizer's own chat template."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._end: list[int] | None = None

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The tokens up to where the assistant's answer begins."""
        return self._encode(self._render(messages, answer=None))

    def answer(self, text: str) -> list[int]:
        """The tokens of an answer, with the token that ends the assistant's turn."""
        return [*self._encode(text), *self._turn_end()]

    def stop_ids(self) -> frozenset[int]:
        """The tokens that end an answer: the template's end of turn and the tokenizer's end of text."""
        return frozenset([*self._turn_end(), int(self._tokenizer.eos_token_id)])

    def plain(self, text: str) -> list[int]:
        """The tokens of a text that is no chat."""
        return self._encode(text)

    def forced(self, messages: Sequence[Message], prefix: str, answer: str) -> tuple[list[int], list[int]]:
        """(prompt with the answer's beginning `prefix`, the tokens that continue it with `answer`), without an end.

        Prefix and answer are tokenized together, because a split inside a word would give tokens that no model says.
        """
        start, whole = self._encode(prefix), self._encode(prefix + answer)
        shared = 0
        while shared < min(len(start), len(whole) - 1) and start[shared] == whole[shared]:
            shared += 1
        return [*self.prompt(messages), *whole[:shared]], whole[shared:]

    def _encode(self, text: str) -> list[int]:
        return [int(token) for token in self._tokenizer.encode(text, add_special_tokens=False)]

    def _render(self, messages: Sequence[Message], *, answer: str | None) -> str:
        chat = [{**message, "content": _plain(message.get("content"))} for message in messages]
        if answer is not None:
            chat.append({"role": "assistant", "content": answer})
        try:
            rendered = self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=answer is None)
        except Exception as error:  # templates raise their own jinja2 errors for roles and orders they do not know
            raise InvalidInputError(f"the base's chat template cannot render these messages: {error}") from error
        return str(rendered)

    def _turn_end(self) -> list[int]:
        """The template's own end of turn: it need not be the tokenizer's end of text (Gemma: <end_of_turn>, <eos>)."""
        if self._end is None:
            before = [{"role": "user", "content": _PROBE}]
            rest = self._render(before, answer=_PROBE).rpartition(_PROBE)[2]
            self._end = self._encode(rest)[:1] or [int(self._tokenizer.eos_token_id)]
        return self._end


def load_chat_tokens(settings: Settings) -> ChatTokens:
    """With the tokenizer of the configured base."""
    from transformers import AutoTokenizer

    return ChatTokens(AutoTokenizer.from_pretrained(settings.base_path or settings.base.model))


def _plain(content: Any) -> Any:
    """OpenAI's list of parts as one text, joined as vLLM joins them for templates that want a string."""
    if isinstance(content, list):
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return content
