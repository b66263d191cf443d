from __future__ import annotations

import json
import pickle
import subprocess
import sys
from typing import Any

import pytest

from scion_adapters.records import VersionRef
from scion_adapters.routing import Assignment
from scion_feedback.privacy import UserHasher
from vllm_scion.capture import Capture, normal_request

KEY = b"a key of more than sixteen bytes"


def make_capture(body: dict[str, Any], answer: dict[str, Any] | None = None, **changes: Any) -> Capture:
    answer = answer or {
        "id": "chatcmpl-1",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}],
    }
    values: dict[str, Any] = {
        "route": "chat",
        "assignment": Assignment(VersionRef("chat", 7), 12, 0.1, "rollout-1"),
        "requested_model": "chat",
        "body": json.dumps(body).encode(),
        "conversation": None,
        "token_counts": (None, None),
        "parts": json.dumps(answer).encode(),
        "stream": False,
        "created_at": 1000.0,
        "latency_ms": 12.5,
        "first_token_ms": None,
        "hash_key": KEY,
        "record_id": "rec-1",
    }
    return Capture(**{**values, **changes})


def test_a_record_says_which_version_answered_and_how_it_was_drawn() -> None:
    body = {"model": "chat", "messages": [{"role": "user", "content": "Hello"}], "user": "ann", "temperature": 0.5}
    record = make_capture(body, conversation="c1")()
    assert record is not None
    assert (record.adapter, record.number, record.probability, record.rollout_id) == ("chat", 7, 0.1, "rollout-1")
    assert (record.user_hash, record.conversation, record.requested_model) == (
        UserHasher(KEY).hash("ann"),
        "c1",
        "chat",
    )
    assert record.request == {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0.5}
    assert (record.finish_reason, record.latency_ms, record.created_at) == ("stop", 12.5, 1000.0)


def test_the_conversation_is_the_bodys_before_the_headers() -> None:
    named = {"messages": [], "metadata": {"conversation_id": "of the body"}}
    for body, header, conversation in (
        (named, "c1", "of the body"),
        ({"messages": []}, "c1", "c1"),
        (named, None, "of the body"),
    ):
        record = make_capture(body, conversation=header)()
        assert record is not None
        assert record.conversation == conversation


def test_the_key_of_the_users_hash_is_in_no_log() -> None:
    assert KEY.decode() not in repr(make_capture({}))


def test_token_counts_come_from_the_wire_or_else_from_vllm() -> None:
    counted = make_capture({"messages": []}, token_counts=(5, 2))()
    assert counted is not None
    assert (counted.prompt_tokens, counted.completion_tokens) == (5, 2)


def test_a_capture_can_be_built_in_another_process() -> None:
    capture = make_capture({"messages": [{"role": "user", "content": "Hi"}], "user": "ann"})
    copy = pickle.loads(pickle.dumps(capture))()
    original = capture()
    assert original is not None
    assert copy == original  # its record id too: an answer that is handed over twice is recorded once


def test_building_a_capture_needs_no_server_libraries() -> None:
    """The recorder's process starts in a fraction of a second and weighs little."""
    script = "import sys, vllm_scion.capture; print({'vllm', 'torch', 'fastapi', 'starlette'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "set()"


def test_the_users_name_is_nowhere_in_the_record() -> None:
    body = {
        "messages": [{"role": "user", "content": "Hello"}],
        "user": "ann@example.org",
        "safety_identifier": "ann@example.org",
        "metadata": {"user_id": "ann@example.org", "tier": "gold"},
    }
    record = make_capture(body)()
    assert record is not None
    assert record.request["metadata"] == {"tier": "gold"}
    assert "ann@example.org" not in json.dumps(record.request)


def test_nothing_is_recorded_of_a_stream_that_had_no_id() -> None:
    assert make_capture({"messages": []}, parts=[], stream=True)() is None


@pytest.mark.parametrize(
    ("route", "body", "messages"),
    [
        # chat stays as it is, parts included
        (
            "chat",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
            [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}],
        ),
        # Anthropic's system prompt and text blocks
        (
            "messages",
            {"system": "Be kind.", "messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
            [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}],
        ),
        # a system prompt in blocks (as with cache control)
        (
            "messages",
            {"system": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}], "messages": []},
            [{"role": "system", "content": "Be kind."}],
        ),
        # Responses: a string, and items
        ("responses", {"input": "Hi"}, [{"role": "user", "content": "Hi"}]),
        (
            "responses",
            {
                "instructions": "Be kind.",
                "input": [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}],
            },
            [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}],
        ),
        # what is not only text stays as it is
        (
            "messages",
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t"}]}]},
            [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t"}]}],
        ),
    ],
)
def test_requests_of_all_chat_routes_are_recorded_in_one_form(
    route: str, body: dict[str, Any], messages: list[dict[str, Any]]
) -> None:
    assert normal_request(route, body) == {"messages": messages}


def test_a_completions_request_keeps_its_prompt() -> None:
    body = {"model": "chat", "prompt": "Once", "max_tokens": 4, "stream": True, "stop": None}
    assert normal_request("completions", body) == {"prompt": "Once", "max_tokens": 4}


def test_long_data_urls_are_recorded_as_digests() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 5000}}
    recorded = normal_request("chat", {"messages": [{"role": "user", "content": [image]}]})
    url = recorded["messages"][0]["content"][0]["image_url"]["url"]
    assert url.startswith("data:image/png;base64,sha256=")
    assert len(url) < 150
    assert image["image_url"]["url"].endswith("AAAA")  # type: ignore[index]  # the request itself is not touched
