"""A server in memory, for the simulated users: it answers chats and takes votes as the real one does."""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

Reply = Callable[[str], str]


@dataclass(slots=True)
class FakeServer:
    """Answers each question with `reply(question)` and remembers every request.

    `chat_status` and `feedback_status` make it fail; `cut_streams` ends streams before their last chunk.
    """

    reply: Reply
    chat_status: int = 200
    feedback_status: int = 200
    cut_streams: bool = False
    version: str = "chat:1"
    chats: list[dict[str, Any]] = field(default_factory=list)
    votes: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    authorizations: set[str] = field(default_factory=set)
    _ids: "itertools.count[int]" = field(default_factory=itertools.count)

    @property
    def transport(self) -> httpx.MockTransport:
        return httpx.MockTransport(self._handle)

    def _handle(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        self.authorizations.add(request.headers["Authorization"])
        if request.url == "http://fake/v1/chat/completions":
            return self._chat(body)
        if request.url == "http://fake/v1/feedback":
            self.votes.append(body)
            self.keys.append(request.headers["Idempotency-Key"])
            return httpx.Response(self.feedback_status, json={"detail": "as told"})
        return httpx.Response(404, json={"detail": str(request.url)})

    def _chat(self, body: dict[str, Any]) -> httpx.Response:
        self.chats.append(body)
        if self.chat_status != 200:
            return httpx.Response(self.chat_status, json={"error": {"message": "as told", "code": self.chat_status}})
        answer = self.reply(body["messages"][-1]["content"])
        common = {"id": f"chatcmpl-{next(self._ids)}", "created": 0, "model": self.version}
        if body.get("stream"):
            return self._stream(common, answer)
        choice = {"index": 0, "message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}
        return httpx.Response(200, json={**common, "object": "chat.completion", "choices": [choice]})

    def _stream(self, common: dict[str, Any], answer: str) -> httpx.Response:
        half = len(answer) // 2
        choices = [
            {"index": 0, "delta": {"role": "assistant", "content": answer[:half]}, "finish_reason": None},
            {"index": 0, "delta": {"content": answer[half:]}, "finish_reason": "stop"},
        ]
        if self.cut_streams:
            choices.pop()
        chunks = [{**common, "object": "chat.completion.chunk", "choices": [choice]} for choice in choices]
        lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
        if not self.cut_streams:
            lines.append("data: [DONE]\n\n")
        return httpx.Response(200, text="".join(lines), headers={"Content-Type": "text/event-stream"})
