"""Chats become the tokens that server and recipes see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scion_adapters.errors import InvalidInputError
from scion_adapters.settings import Settings
from scion_trainer.chat_tokens import ChatTokens, load_chat_tokens
from tests.helpers.fake_server import END, FakeTokenizer
from tests.helpers.tiny_model import build_tiny_model

TOKENS = ChatTokens(FakeTokenizer())
HELLO = [{"role": "user", "content": "hello"}]


def decoded(tokens: list[int]) -> str:
    return "".join(map(chr, tokens))


class MergingTokenizer(FakeTokenizer):
    """Like real ones, it joins " P" and "ab" into one token each."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        joined = text.replace(" P", "\ue000").replace("ab", "\ue001")
        return super().encode(joined, add_special_tokens=add_special_tokens)


def test_the_prompt_ends_where_the_answer_begins() -> None:
    assert decoded(TOKENS.prompt(HELLO)).endswith("<assistant>")


def test_an_answer_ends_with_the_templates_end_of_turn() -> None:
    assert TOKENS.answer("hi") == [ord("h"), ord("i"), END]


@pytest.mark.parametrize(
    ("prefix", "answer", "scored"),
    [
        ("It is", " Paris", "\ue000aris"),  # a clean cut
        ("It is ", "Paris", "\ue000aris"),  # the cut falls between the space and the letter that make one token
        ("xa", "b", "\ue001"),  # the cut falls inside a token: all of it belongs to the answer
        ("", "b", "b"),  # nothing forced
    ],
)
def test_a_forced_answer_is_tokenized_as_one_text(prefix: str, answer: str, scored: str) -> None:
    prompt, tokens = ChatTokens(MergingTokenizer()).forced(HELLO, prefix, answer)
    assert decoded(tokens) == scored
    joined = (prefix + answer).replace(" P", "\ue000").replace("ab", "\ue001")
    assert decoded(prompt + tokens).endswith(joined)


def test_parts_of_text_are_joined_as_the_server_joins_them() -> None:
    parts: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    ]
    assert TOKENS.prompt(parts) == TOKENS.prompt([{"role": "user", "content": "a\nb"}])


def test_messages_that_the_template_refuses_are_invalid_input() -> None:
    with pytest.raises(InvalidInputError, match="unknown role"):
        TOKENS.prompt([{"role": "refused", "content": "x"}])


def test_a_real_tokenizer_agrees_with_its_own_template(tmp_path: Path) -> None:
    build_tiny_model(tmp_path)
    tokens = load_chat_tokens(Settings.model_validate({"base": {"model": str(tmp_path)}}))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    whole = tokenizer.apply_chat_template([*HELLO, {"role": "assistant", "content": "hi"}], tokenize=False)
    assert tokens.prompt(HELLO) + tokens.answer("hi") == tokenizer.encode(whole, add_special_tokens=False)
