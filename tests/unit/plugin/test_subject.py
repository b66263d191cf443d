from __future__ import annotations

from typing import Any

import pytest

from vllm_scion.subject import conversation_of, subject_of, user_of

CHAT = {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]}


@pytest.mark.parametrize(
    ("body", "headers", "kind"),
    [
        # the user outranks everything
        ({**CHAT, "user": "ann", "metadata": {"conversation_id": "c1"}}, {"x-conversation-id": "c2"}, "user:ann"),
        # OpenAI's newer name of it
        ({**CHAT, "safety_identifier": "ann"}, {}, "user:ann"),
        # Anthropic's
        ({**CHAT, "metadata": {"user_id": "ann"}}, {}, "user:ann"),
        # no user: the conversation, from the body before the header
        ({**CHAT, "metadata": {"conversation_id": "c1"}}, {"x-conversation-id": "c2"}, "conversation:c1"),
        ({**CHAT}, {"x-conversation-id": "c2"}, "conversation:c2"),
        # the Responses API's conversation, as an id or as an object
        ({"input": "Hi", "conversation": "conv_1"}, {}, "conversation:conv_1"),
        ({"input": "Hi", "conversation": {"id": "conv_1"}}, {}, "conversation:conv_1"),
        # empty and mistyped values count as absent
        ({**CHAT, "user": "", "metadata": {"conversation_id": 7}}, {"x-conversation-id": "c2"}, "conversation:c2"),
        # a metadata that is no object must not break anything
        ({**CHAT, "user": "ann", "metadata": "x"}, {}, "user:ann"),
        # nothing at all
        ({}, {}, "anonymous"),
    ],
)
def test_the_subject_is_the_most_stable_name_there_is(body: dict[str, Any], headers: dict[str, str], kind: str) -> None:
    assert subject_of(body, headers) == kind


def test_a_growing_conversation_keeps_its_subject() -> None:
    first = subject_of(CHAT, {})
    turns = [*CHAT["messages"], {"role": "assistant", "content": "Hi!"}, {"role": "user", "content": "And you?"}]
    assert subject_of({"messages": turns}, {}) == first
    assert first.startswith("opening:")


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": "Hello"}]},  # another opening: no system prompt
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]},  # parts instead of a string
        {"system": "Be kind.", "messages": [{"role": "user", "content": "Bye"}]},  # Anthropic's system prompt
        {"prompt": "Hello"},  # completions
        {"prompt": [1, 2, 3]},  # token ids
        {"input": [{"role": "user", "content": "Hello!"}], "instructions": "Be kind."},  # responses
    ],
)
def test_every_route_has_an_opening(body: dict[str, Any]) -> None:
    subject = subject_of(body, {"authorization": "Bearer key"})
    assert subject.startswith("opening:")
    assert subject != subject_of(CHAT, {})


def test_without_messages_the_api_key_is_the_subject_and_never_in_clear() -> None:
    subject = subject_of({"messages": []}, {"authorization": "Bearer sk-secret"})
    assert subject.startswith("key:")
    assert "sk-secret" not in subject


def test_lone_surrogates_in_a_message_do_not_break_routing() -> None:
    assert subject_of({"messages": [{"role": "user", "content": "\ud800"}]}, {}).startswith("opening:")


def test_user_and_conversation_are_absent_without_a_name() -> None:
    assert user_of(CHAT) is None
    assert conversation_of(CHAT, {}) is None
