"""A teacher on a local port: an OpenAI-compatible endpoint that answers by rule."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class FakeTeacher:
    """`says` maps the last message to (text, finish reason). `refusals` are statuses to answer with first."""

    url: str = ""
    says: Callable[[str], tuple[str, str]] = lambda prompt: ("so it is.", "stop")
    refusals: list[int] = field(default_factory=list)
    key: str | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)


@contextmanager
def serve_teacher(teacher: FakeTeacher) -> Iterator[FakeTeacher]:
    """Serve `teacher` and set its URL."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                teacher.asked.append(body)
                status = teacher.refusals.pop(0) if teacher.refusals else 200
            if self.path != "/v1/chat/completions":
                status = 404
            if teacher.key is not None and self.headers.get("Authorization") != f"Bearer {teacher.key}":
                status = 401
            text, reason = teacher.says(body["messages"][-1]["content"])
            message = {"role": "assistant", "content": text}
            answer = {"model": "teacher-1", "choices": [{"index": 0, "message": message, "finish_reason": reason}]}
            content = json.dumps(answer if status == 200 else {"error": {"message": "not now"}}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        teacher.url = f"http://127.0.0.1:{server.server_port}/v1"
        try:
            yield teacher
        finally:
            server.shutdown()
            thread.join()
