from __future__ import annotations

import json
from typing import Any, ClassVar

import pytest

from vllm_scion.answers import Answer, read_answer


def sse(*events: Any, done: bool = True) -> list[str]:
    chunks = [f"data: {json.dumps(event, ensure_ascii=False)}\n\n" for event in events]
    return [*chunks, "data: [DONE]\n\n"] if done else chunks


def chat_chunk(index: int, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {"id": "chatcmpl-1", "choices": [{"index": index, "delta": delta, "finish_reason": finish}]}


def stream(route: str, chunks: list[str]) -> Answer:
    answer = read_answer(route, chunks, stream=True)
    assert answer is not None
    return answer


class TestChat:
    def test_a_body_keeps_message_and_counts_and_drops_nulls(self) -> None:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": "Paris.",
            "refusal": None,
            "tool_calls": [],
            "reasoning": None,
        }
        body = {
            "id": "chatcmpl-1",
            "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": {"content": []}}],
            "usage": {"prompt_tokens": 7, "completion_tokens": 3},
        }
        answer = read_answer("chat", json.dumps(body).encode(), stream=False)
        choice = {"index": 0, "message": {"role": "assistant", "content": "Paris."}, "finish_reason": "stop"}
        assert answer == Answer("chatcmpl-1", [choice], 7, 3)

    def test_a_stream_of_two_choices_is_put_together_in_order(self) -> None:
        answer = stream(
            "chat",
            sse(
                chat_chunk(1, {"role": "assistant", "content": ""}),
                chat_chunk(0, {"content": "Par"}),
                chat_chunk(1, {"content": "Lyon"}),
                chat_chunk(0, {"content": "is"}, "stop"),
                chat_chunk(1, {}, "length"),
                {"id": "chatcmpl-1", "choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 4}},
            ),
        )
        assert [c["message"]["content"] for c in answer.choices] == ["Paris", "Lyon"]
        assert [c["finish_reason"] for c in answer.choices] == ["stop", "length"]
        assert (answer.prompt_tokens, answer.completion_tokens) == (7, 4)

    def test_streamed_tool_calls_are_merged_by_index(self) -> None:
        answer = stream(
            "chat",
            sse(
                chat_chunk(0, {"tool_calls": [{"index": 0, "id": "c1", "function": {"name": "get", "arguments": ""}}]}),
                chat_chunk(0, {"tool_calls": [{"index": 0, "function": {"arguments": '{"a"'}}]}),
                chat_chunk(
                    0, {"tool_calls": [{"index": 1, "id": "c2", "function": {"name": "put", "arguments": "{}"}}]}
                ),
                chat_chunk(0, {"tool_calls": [{"index": 0, "function": {"arguments": ":1}"}}]}, "tool_calls"),
            ),
        )
        assert answer.choices[0]["message"] == {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "get", "arguments": '{"a":1}'}},
                {"id": "c2", "type": "function", "function": {"name": "put", "arguments": "{}"}},
            ],
        }

    @pytest.mark.parametrize(
        ("last", "reason"),
        [
            (chat_chunk(0, {"content": "lf"}), "cancelled"),  # the client left in mid-answer
            ({"error": {"message": "engine died", "code": 500}}, "error"),  # vLLM's error within a 200 stream
            (chat_chunk(0, {"content": "lf"}, "stop"), "stop"),  # the client left after the end: complete
        ],
    )
    def test_a_broken_off_stream_says_how_it_ended(self, last: dict[str, Any], reason: str) -> None:
        answer = stream("chat", sse(chat_chunk(0, {"content": "ha"}), last, done=False))
        assert answer.finish_reason == reason

    def test_a_stream_that_broke_off_before_its_id_is_no_answer(self) -> None:
        assert read_answer("chat", [], stream=True) is None
        assert read_answer("chat", [": keep-alive\n\n"], stream=True) is None

    def test_chunks_may_split_lines_and_hold_line_separators(self) -> None:
        text = "".join(sse(chat_chunk(0, {"content": "a\u2028b"}, "stop"))).encode()
        pieces: list[str | bytes] = [text[i : i + 7] for i in range(0, len(text), 7)]
        answer = read_answer("chat", pieces, stream=True)
        assert answer is not None
        assert answer.choices[0]["message"]["content"] == "a\u2028b"


class TestCompletions:
    def test_body_and_stream_give_the_same(self) -> None:
        choices = [
            {"index": 0, "text": "one", "finish_reason": "stop"},
            {"index": 1, "text": "two", "finish_reason": "length"},
        ]
        body = {"id": "cmpl-1", "choices": choices, "usage": {"prompt_tokens": 2, "completion_tokens": 2}}
        chunks = sse(
            {"id": "cmpl-1", "choices": [{"index": 1, "text": "tw", "finish_reason": None}]},
            {"id": "cmpl-1", "choices": [{"index": 0, "text": "one", "finish_reason": "stop"}]},
            {"id": "cmpl-1", "choices": [{"index": 1, "text": "o", "finish_reason": "length"}]},
            {"id": "cmpl-1", "choices": [], "usage": body["usage"]},
        )
        assert read_answer("completions", json.dumps(body).encode(), stream=False) == stream("completions", chunks)


class TestResponses:
    BODY: ClassVar = {
        "id": "resp_1",
        "status": "completed",
        "output": [
            {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"type": "message", "content": [{"type": "output_text", "text": "Paris."}]},
        ],
        "usage": {"input_tokens": 5, "output_tokens": 3},
    }

    def test_a_body_becomes_a_chat_message(self) -> None:
        answer = read_answer("responses", json.dumps(self.BODY).encode(), stream=False)
        choice = {"index": 0, "message": {"role": "assistant", "content": "Paris."}, "finish_reason": "stop"}
        assert answer == Answer("resp_1", [choice], 5, 3)

    def test_a_complete_stream_is_read_from_its_last_event(self) -> None:
        chunks = sse(
            {"type": "response.created", "response": {"id": "resp_1"}},
            {"type": "response.output_text.delta", "delta": "Par"},
            {"type": "response.completed", "response": self.BODY},
            done=False,
        )
        assert stream("responses", chunks).choices[0]["message"]["content"] == "Paris."

    def test_a_broken_off_stream_keeps_what_was_sent(self) -> None:
        chunks = sse(
            {"type": "response.created", "response": {"id": "resp_1"}},
            {"type": "response.output_text.delta", "delta": "Par"},
            done=False,
        )
        answer = stream("responses", chunks)
        assert (answer.id, answer.choices[0]["message"]["content"], answer.finish_reason) == (
            "resp_1",
            "Par",
            "cancelled",
        )

    @pytest.mark.parametrize(
        ("body", "reason"),
        [
            ({"status": "incomplete"}, "length"),  # max_output_tokens
            ({"status": "failed"}, "error"),
            ({"output": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}]}, "tool_calls"),
        ],
    )
    def test_finish_reasons_are_those_of_chat(self, body: dict[str, Any], reason: str) -> None:
        answer = read_answer("responses", json.dumps({**self.BODY, **body}).encode(), stream=False)
        assert answer is not None
        assert answer.finish_reason == reason


class TestMessages:
    def test_a_body_becomes_a_chat_message(self) -> None:
        body = {
            "id": "chatcmpl-1",
            "content": [
                {"type": "thinking", "thinking": "hm"},
                {"type": "text", "text": "Look."},
                {"type": "tool_use", "id": "t1", "name": "get", "input": {"a": 1}},
            ],
            "stop_reason": "tool_use",
            "usage": {"input_tokens": 5, "output_tokens": 3},
        }
        answer = read_answer("messages", json.dumps(body).encode(), stream=False)
        assert answer is not None
        call = {"id": "t1", "type": "function", "function": {"name": "get", "arguments": '{"a": 1}'}}
        assert answer.choices[0]["message"] == {"role": "assistant", "content": "Look.", "tool_calls": [call]}
        assert (answer.finish_reason, answer.prompt_tokens, answer.completion_tokens) == ("tool_calls", 5, 3)

    def test_a_stream_is_put_together(self) -> None:
        chunks = sse(
            {"type": "message_start", "message": {"id": "m1", "usage": {"input_tokens": 5, "output_tokens": 0}}},
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Par"}},
            {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "is"}},
            {"type": "message_delta", "delta": {"stop_reason": "max_tokens"}, "usage": {"output_tokens": 2}},
            {"type": "message_stop"},
            done=False,
        )
        answer = stream("messages", chunks)
        assert answer.choices[0]["message"]["content"] == "Paris"
        assert (answer.finish_reason, answer.prompt_tokens, answer.completion_tokens) == ("length", 5, 2)

    def test_a_broken_off_stream_is_cancelled(self) -> None:
        chunks = sse({"type": "message_start", "message": {"id": "m1"}}, done=False)
        assert stream("messages", chunks).finish_reason == "cancelled"


def test_an_unreadable_body_raises_so_that_the_loss_is_counted() -> None:
    with pytest.raises(ValueError, match=r"Expecting value"):
        read_answer("chat", b"not json", stream=False)
