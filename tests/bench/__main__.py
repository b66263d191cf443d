"""`python -m tests.bench [NAME ...] [--quick] [--output DIR]`: run benchmarks, print tables, write DIR/NAME.json."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from types import FrameType

from rich.console import Console

from tests.bench import gates, gpu, methods, overhead, ppo, report, reward, rollouts, swap

BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (module.BENCHMARK for module in (gates, gpu, methods, overhead, ppo, reward, rollouts, swap))
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one or more of {', '.join(BENCHMARKS)}; default all")
    parser.add_argument("--quick", action="store_true", help="seconds, not minutes: shows only that the code works")
    parser.add_argument("--output", type=Path, default=Path("build/bench"), help="folder for the results")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.names) - set(BENCHMARKS)):
        parser.error(f"no benchmark {', '.join(unknown)}: there are {', '.join(BENCHMARKS)}")
    signal.signal(signal.SIGTERM, _end)
    console = Console()
    for name in options.names or BENCHMARKS:
        benchmark = BENCHMARKS[name]
        before = report.machine()
        outcome = benchmark.run(options.output, options.quick)
        path = report.write(benchmark, outcome, options.output, before, quick=options.quick)
        report.show(benchmark, outcome, console)
        console.print(f"written to {path}", highlight=False)
    return 0


def _end(number: int, frame: FrameType | None) -> None:
    """A benchmark that is told to stop takes its servers along: `finally` blocks run."""
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
