"""While users' requests are in the engine, rollouts of a training run wait: what a step of vLLM's scheduler leaves out.

vLLM's priorities decide who gets into a batch and who is thrown out of it when memory is short. In between all go
through the same steps, and a step takes longer the more it holds. Here rollouts keep their place and their cache and
are left out of the steps that users need. Owns that decision; private_vllm.py puts it in place.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

from scion_adapters.steps import ROLLOUT_PRIORITY

LONGEST_WAIT_S = 1.0
"""After it rollouts take part in one step beside users, so that they end some day on a server that is never idle."""


def users_first(original: Callable[..., Any], clock: Callable[[], float] = time.monotonic) -> Callable[..., Any]:
    """`original`, a scheduler's method that makes up one step, without rollouts where users are to be served.

    Used with the scheduling policy "priority" only. Whoever is left out stays in the scheduler as it was.
    """

    @functools.wraps(original)
    def schedule(scheduler: Any, *arguments: Any, **named: Any) -> Any:
        running, waiting = left_out(scheduler, clock())
        if not running and not waiting:
            return original(scheduler, *arguments, **named)
        scheduler.running = [request for request in scheduler.running if not is_rollout(request)]
        scheduler.waiting.remove_requests(waiting)
        try:
            return original(scheduler, *arguments, **named)
        finally:
            scheduler.is_short_for_users = len(scheduler.waiting) > 0
            scheduler.running = [*scheduler.running, *running]
            for request in waiting:
                scheduler.waiting.add_request(request)

    schedule.puts_users_first = True  # type: ignore[attr-defined]
    return schedule


def left_out(scheduler: Any, now_s: float) -> tuple[list[Any], list[Any]]:
    """The running and the waiting rollouts that the next step does without. Notes when one did not.

    None after LONGEST_WAIT_S, and where users do not fit beside what rollouts hold: then rollouts go on until there is
    room, as vLLM throws nobody out of a place; for want of memory it does, the rollouts first.
    """
    if scheduler.policy.value != "priority":
        return [], []
    running = [request for request in scheduler.running if is_rollout(request)]
    waiting = [request for request in scheduler.waiting if is_rollout(request)]
    if not (running or waiting):
        scheduler.rollouts_wait_since_s = None
        return [], []
    num_users = len(scheduler.running) - len(running) + len(scheduler.waiting) - len(waiting)
    was_short, scheduler.is_short_for_users = getattr(scheduler, "is_short_for_users", False), False
    is_full = was_short or num_users + len(running) > scheduler.max_num_running_reqs
    since_s = getattr(scheduler, "rollouts_wait_since_s", None)
    since_s = now_s if since_s is None else since_s
    if num_users and not is_full and now_s - since_s < LONGEST_WAIT_S:
        scheduler.rollouts_wait_since_s = since_s
        return running, waiting
    scheduler.rollouts_wait_since_s = now_s
    return [], []


def is_rollout(request: Any) -> bool:
    """Whether nobody waits for the answer."""
    return bool(request.priority >= ROLLOUT_PRIORITY)
