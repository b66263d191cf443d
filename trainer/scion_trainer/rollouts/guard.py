"""`python -m scion_trainer.rollouts.guard COMMAND…`: runs COMMAND until our own stdin is closed, then ends all of it.

The other end of stdin is the run's: however that ends, SIGKILL included, the kernel closes it, and no engine is left
behind. Imports nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading

GRACE_S = 15.0


def main(command: list[str]) -> int:
    """Returns the command's exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the run's to handle: it closes our stdin
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    signal.signal(signal.SIGTERM, lambda *_: end(child))
    threading.Thread(target=_end_with_stdin, args=(child,), daemon=True).start()
    status = child.wait()
    _kill_group(child.pid)  # its engine process, if it left one
    return status if status >= 0 else 128 - status


def end(child: subprocess.Popen[bytes]) -> None:
    """SIGTERM, and SIGKILL to the whole group after GRACE_S."""
    if child.poll() is None:
        child.terminate()
        timer = threading.Timer(GRACE_S, _kill_group, args=(child.pid,))
        timer.daemon = True
        timer.start()


def _end_with_stdin(child: subprocess.Popen[bytes]) -> None:
    while os.read(sys.stdin.fileno(), 4096):
        pass
    end(child)


def _kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
