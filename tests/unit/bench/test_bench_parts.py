"""The parts of the benchmarks that decide what is reported: statistics, the load generator, bars and the JSON file."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.bench import report
from tests.bench.figures import added, median_ratio, paired, percentile
from tests.bench.load import Load, run
from tests.bench.overhead_stub import CONTROL, OURS, SERVERS, STOCK, Series
from tests.bench.report import Bar, Benchmark, Outcome

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n"
REFUSAL = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n"


@contextmanager
def _server(answers: list[bytes | float]) -> Iterator[int]:
    """One thread that answers one connection after the other; a number in `answers` is a stall in seconds."""
    listener = socket.create_server(("127.0.0.1", 0))
    stop = threading.Event()
    todo = iter(answers)

    def serve() -> None:
        while not stop.is_set():
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                while connection.recv(65536):
                    answer = next(todo, ANSWER)
                    while isinstance(answer, float):
                        stop.wait(answer)
                        answer = next(todo, ANSWER)
                    connection.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        stop.set()
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(timeout=10)


def _load(port: int, count: int, rate: float | None, *, warmup_s: float = 0.0, timeout_s: float = 5.0) -> Load:
    return Load("127.0.0.1", port, "/", ("{}",), count, rate, warmup_s, max_connections=1, timeout_s=timeout_s)


def test_a_stall_is_charged_to_every_request_that_waited_for_it() -> None:
    with _server([ANSWER, 0.3, ANSWER]) as port:
        measured = run(_load(port, count=20, rate=100.0))
    assert measured.failed == 0
    assert len(measured.latency_ms) == 20
    # Requests 2, 3, 4… were due 0, 10, 20… ms into the stall: sending them late must not make them look fast.
    waited = [latency for latency in measured.latency_ms if latency > 150]
    assert len(waited) >= 10


@pytest.mark.parametrize(
    ("answers", "failed"),
    [
        ([ANSWER] * 5, 0),  # a body with a length
        ([CHUNKED] * 5, 0),  # a stream
        ([ANSWER, REFUSAL, ANSWER, ANSWER, ANSWER], 1),  # the server says no
    ],
)
def test_answers_are_told_from_failures(answers: list[bytes | float], failed: int) -> None:
    with _server(answers) as port:
        measured = run(_load(port, count=5, rate=200.0))
    assert measured.failed == failed
    assert len(measured.latency_ms) == 5 - failed


def test_a_request_that_is_never_answered_counts_as_failed() -> None:
    with _server([ANSWER, 30.0]) as port:
        measured = run(_load(port, count=2, rate=200.0, timeout_s=0.2))
    assert measured.failed == 1


def test_the_warm_up_is_sent_but_not_counted() -> None:
    with _server([]) as port:
        measured = run(_load(port, count=20, rate=200.0, warmup_s=0.0475))
    assert measured.sent == 20
    assert len(measured.latency_ms) == 10


def test_a_closed_loop_keeps_its_clients_busy() -> None:
    with _server([]) as port:
        measured = run(_load(port, count=50, rate=None))
    assert measured.failed == 0
    assert len(measured.latency_ms) == 50
    assert measured.connections == 1


def test_percentiles_are_of_all_blocks_together() -> None:
    assert percentile([[1.0, 2.0], [3.0]], 50) == 2.0


def test_added_latency_has_an_interval_around_it() -> None:
    stock = [[1.0 + i / 100 for i in range(100)] for _ in range(8)]
    ours = [[value + 0.25 for value in block] for block in stock]
    interval = added(stock, ours, 50)
    assert interval.value == pytest.approx(0.25)
    assert interval.low <= interval.value <= interval.high


def test_one_spoiled_pair_moves_the_pooled_figure_and_not_the_paired_one() -> None:
    stock = [[1.0] * 100 for _ in range(9)]
    ours = [[1.1] * 100 for _ in range(8)] + [[500.0] * 100]
    assert added(stock, ours, 99).value > 400
    assert paired(stock, ours, 99).value == pytest.approx(0.1)


def test_the_ratio_is_the_median_of_neighbours() -> None:
    interval = median_ratio([100, 50, 10], [99, 49.5, 10.5])  # the machine slowed down, both alike
    assert interval.value == pytest.approx(0.99)


@pytest.mark.parametrize(
    ("bar", "met"),
    [
        (Bar("latency", 0.2, 0.3), True),  # below an upper bound
        (Bar("latency", 0.4, 0.3), False),
        (Bar("ratio", 0.99, 0.98, at_least=True), True),  # above a lower bound
        (Bar("ratio", 0.97, 0.98, at_least=True), False),
        (Bar("latency", -40.0, 0.3, is_measurable=False), False),  # noise reaches no bar
    ],
)
def test_a_bar_is_an_upper_or_a_lower_bound(bar: Bar, met: bool) -> None:
    assert bar.met is met


def test_the_file_holds_figures_bars_and_the_machine(tmp_path: Path) -> None:
    outcome = Outcome({"added": 0.2}, (Bar("added p50", 0.2, 0.3, unit="ms"),))
    benchmark = Benchmark("sample", "a sample", lambda output, quick: outcome)
    path = report.write(benchmark, outcome, tmp_path / "bench", report.machine(), quick=False)
    document = json.loads(path.read_text())
    assert path.name == "sample.json"
    assert document["name"] == "sample"
    assert document["figures"] == {"added": 0.2}
    assert document["bars"] == [{"name": "added p50", "value": 0.2, "bar": 0.3, "met": True, "measurable": True}]
    assert document["machine"]["cores"] >= 1


@pytest.mark.parametrize(
    ("p99_ms", "is_steady"),
    [
        ({STOCK: 5.0, CONTROL: 5.9, OURS: 5.0}, True),
        ({STOCK: 5.0, CONTROL: 5.0, OURS: 50.0}, True),
        ({STOCK: 10.5, CONTROL: 9.9, OURS: 9.9}, False),
        ({STOCK: 5.0, CONTROL: 6.1, OURS: 5.0}, False),
    ],
)
def test_whether_a_rate_is_sustained_is_for_the_stock_servers_to_say(p99_ms: dict[str, float], is_steady: bool) -> None:
    series = Series("plain", rate=100.0, share=1.0, blocks={name: [[p99_ms[name]] * 50] * 4 for name in SERVERS})
    assert series.is_steady() is is_steady


def test_a_rate_at_which_equal_servers_may_differ_by_more_than_the_bar_is_not_sustained() -> None:
    calm, burst = [[3.0] * 50] * 9, [[9.0] * 50]
    series = Series("plain", 100.0, 1.0, blocks={STOCK: calm + burst, CONTROL: [*calm, calm[0]], OURS: calm})
    series.blocks[CONTROL][0] = [9.0] * 50
    assert series.added(99, CONTROL).value == 0.0, "by chance both had one"
    assert not series.is_steady()


def test_a_rate_at_which_stock_fails_requests_is_not_sustained() -> None:
    series = Series("plain", rate=100.0, share=1.0, blocks={name: [[5.0] * 50] * 4 for name in SERVERS})
    series.num_failed[CONTROL] = 1
    assert not series.is_steady()
