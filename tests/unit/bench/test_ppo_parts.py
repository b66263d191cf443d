"""Parts of the PPO benchmark: the reward that both sides climb, the row of a side, and that memory counts children."""

from __future__ import annotations

import subprocess
import sys

from tests.bench.ppo import Memory, Side, row_of
from tests.bench.ppo_task import Record, reward_of
from tests.helpers.waiting import wait_for

HOLD = "import sys; held = bytearray(int(sys.argv[1])); print('up', flush=True); sys.stdin.read()"
PARENT = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {HOLD!r}, sys.argv[1]])"


def test_the_reward_is_the_share_of_low_tokens() -> None:
    assert reward_of([0, 1, 2, 3], vocab=4) == 0.5
    assert reward_of([1, 1], vocab=4) == 1.0
    assert reward_of([2], vocab=4) == 0.0


def test_a_side_s_seconds_leave_the_first_update_out() -> None:
    side = Side("ours", Record(seconds=[9.0, 2.0, 4.0, 3.0], rewards=[0.5, 0.6, 0.7, 0.8]), peak_bytes=3 << 29)
    assert side.seconds == 3.0
    assert row_of(side) == ("ours", "3.00", "1.50", "0.50", "0.80")
    assert Side("one", Record(seconds=[9.0], rewards=[0.5]), 1).seconds == 9.0


def test_memory_counts_what_children_hold() -> None:
    size = 60 << 20
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(size)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    memory = Memory(process.pid)
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    wait_for(lambda: memory.peak_bytes > size, "that the child is seen")
    process.stdin.close()
    process.stdout.close()
    process.wait()
    assert size < memory.stop() < 3 * size
