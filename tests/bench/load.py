"""A load generator in a process of its own. Open loop: requests leave at fixed times, whether or not answers have come.

Latency runs from the time at which a request was due, not from when it was sent, so that a stalled server cannot hide
the requests that waited for it (wrk2's argument against "coordinated omission", https://github.com/giltene/wrk2). One
thread over keep-alive connections and select(2), whose timeout counts microseconds where epoll's counts milliseconds: a
general HTTP client would add more than what is to be measured. `Generator` is the parent's side.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import select
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PR_SET_TIMERSLACK = 29
SPIN_S = 0.0001  # the last stretch before a request is due is spun: a timer wakes up to this much late


@dataclass(frozen=True, slots=True)
class Load:
    """One block: `bodies` in turn, `num_requests` of them, of which those of the first `warmup_s` are not counted.

    `rate` per second in an open loop; None = a closed loop of `max_connections` clients without pauses.
    """

    host: str
    port: int
    path: str
    bodies: tuple[str, ...]
    num_requests: int
    rate: float | None
    warmup_s: float = 0.2
    max_connections: int = 256
    timeout_s: float = 10.0


@dataclass(slots=True)
class Measured:
    """All in milliseconds, one entry per counted request, in the order in which they were answered."""

    latency_ms: list[float] = field(default_factory=list)
    first_byte_ms: list[float] = field(default_factory=list)
    lag_ms: list[float] = field(default_factory=list)  # how late the generator itself sent: must be small
    sent: int = 0
    failed: int = 0
    connections: int = 0
    seconds: float = 0.0


class _Connection:
    """One keep-alive connection with at most one request on it."""

    __slots__ = ("buffer", "counted", "due", "end", "first", "head", "sock")

    def __init__(self, load: Load) -> None:
        self.sock = socket.create_connection((load.host, load.port), timeout=load.timeout_s)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)

    def send(self, request: bytes, due: float, counted: bool) -> None:
        self.buffer, self.head, self.end, self.first = b"", -1, -1, 0.0
        self.due, self.counted = due, counted
        self.sock.sendall(request)

    def receive(self, now: float) -> bool:
        """Read what is there; True when the answer is complete. Raises ConnectionError when the server closed it."""
        data = self.sock.recv(1 << 18)
        if not data:
            raise ConnectionError("the server closed the connection")
        self.first = self.first or now
        self.buffer += data
        if self.head < 0:
            self.head = self.buffer.find(b"\r\n\r\n")
            if self.head < 0:
                return False
            head = self.buffer[: self.head].lower()
            at = head.find(b"content-length:")
            if at >= 0:
                self.end = self.head + 4 + int(head[at + 15 :].split(b"\r\n", 1)[0])
        return len(self.buffer) >= self.end if self.end >= 0 else self.buffer.endswith(b"\r\n0\r\n\r\n")

    @property
    def ok(self) -> bool:
        return self.buffer[9:12] == b"200"


def run(load: Load) -> Measured:
    """Send the block and wait for its answers. A request that fails, or is not answered in time, counts as failed."""
    requests = [_request(load, body) for body in load.bodies]
    measured = Measured(sent=load.num_requests)
    idle: deque[_Connection] = deque()
    busy: dict[socket.socket, _Connection] = {}
    waiting: deque[tuple[float, bytes, bool]] = deque()  # due, but every connection is busy
    gc.collect()
    gc.disable()
    clock = time.perf_counter
    start = clock() + 0.05
    interval = 1 / load.rate if load.rate else 0.0
    number = 0
    answered_at = start
    try:
        while number < load.num_requests or busy or waiting:
            now = clock()
            while number < load.num_requests and (
                start + number * interval <= now if load.rate else len(busy) + len(waiting) < load.max_connections
            ):
                due = start + number * interval if load.rate else max(now, start)
                waiting.append((due, requests[number % len(requests)], due - start >= load.warmup_s))
                number += 1
            while waiting and (idle or len(busy) < load.max_connections):
                due, request, counted = waiting.popleft()
                connection = idle.pop() if idle else _Connection(load)
                connection.send(request, due, counted)
                busy[connection.sock] = connection
                measured.connections = max(measured.connections, len(busy) + len(idle))
                if counted:
                    measured.lag_ms.append((clock() - due) * 1e3)
            now = clock()
            if now > max(answered_at, start + number * interval) + load.timeout_s:
                break
            is_next_timed = load.rate is not None and number < load.num_requests
            pause = start + number * interval - now - SPIN_S if is_next_timed else load.timeout_s
            ready, _, _ = select.select(list(busy), [], [], max(0.0, pause))
            for sock in ready:
                now = clock()
                connection = busy[sock]
                try:
                    if not connection.receive(now):
                        continue
                except OSError:
                    measured.failed += 1
                    del busy[sock]
                    sock.close()
                    continue
                del busy[sock]
                idle.append(connection)
                answered_at = now
                if not connection.ok:
                    measured.failed += 1
                elif connection.counted:
                    measured.latency_ms.append((now - connection.due) * 1e3)
                    measured.first_byte_ms.append((connection.first - connection.due) * 1e3)
        measured.failed += len(busy) + len(waiting) + (load.num_requests - number)
        measured.seconds = answered_at - start
    finally:
        gc.enable()
        for connection in [*idle, *busy.values()]:
            connection.sock.close()
    return measured


def _request(load: Load, body: str) -> bytes:
    payload = body.encode()
    head = (
        f"POST {load.path} HTTP/1.1\r\nHost: {load.host}:{load.port}\r\nContent-Type: application/json\r\n"
        f"Accept: */*\r\nContent-Length: {len(payload)}\r\n\r\n"
    )
    return head.encode() + payload


class Generator:
    """A load-generating child on cores of its own; `measure` sends it one block and returns what it saw."""

    def __init__(self, cores: Sequence[int] | None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.load", ",".join(map(str, cores or ()))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).resolve().parents[2],
        )

    def measure(self, load: Load) -> Measured:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(load)) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the load generator ended with status {self._process.wait()}: see its messages above")
        return Measured(**json.loads(line))

    def __enter__(self) -> Generator:
        return self

    def __exit__(self, *exc_info: object) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)
        self._process.stdout.close()


def main() -> None:
    cores = [int(core) for core in sys.argv[1].split(",") if core]
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    with contextlib.suppress(OSError, AttributeError):  # Linux only; elsewhere timers are a little later
        ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1000, 0, 0, 0)
    for line in sys.stdin:
        values: dict[str, Any] = json.loads(line)
        values["bodies"] = tuple(values["bodies"])
        print(json.dumps(asdict(run(Load(**values)))), flush=True)


if __name__ == "__main__":
    main()
