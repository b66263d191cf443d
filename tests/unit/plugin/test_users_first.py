"""Which requests a step leaves out, on vLLM's own queue and a scheduler that takes whom it may."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue
from vllm.v1.core.sched.scheduler import Scheduler

from scion_adapters.steps import ROLLOUT_PRIORITY
from vllm_scion.private_vllm import let_users_go_first
from vllm_scion.users_first import LONGEST_WAIT_S, users_first


@dataclass(order=True, unsafe_hash=True)
class Request:
    priority: int
    name: str


NOW = [0.0]


@dataclass
class FakeScheduler:
    """Lets in who waits while there is room, and notes who is in a step."""

    running: list[Request] = field(default_factory=list)
    queued: list[Request] = field(default_factory=list)
    policy: SchedulingPolicy = SchedulingPolicy.PRIORITY
    max_num_running_reqs: int = 8
    room: int = 8
    steps: list[set[str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.waiting: Any = create_request_queue(self.policy)
        for request in self.queued:
            self.waiting.add_request(request)

    def fill(self, throttle_prefills: bool = False) -> str:
        while self.waiting and len(self.running) < self.room:
            self.running.append(self.waiting.pop_request())
        self.steps.append({request.name for request in self.running})
        return "output"

    schedule = users_first(fill, clock=lambda: NOW[0])

    @property
    def names(self) -> set[str]:
        return {request.name for request in [*self.running, *self.waiting]}


def user(name: str) -> Request:
    return Request(0, name)


def rollout(name: str) -> Request:
    return Request(ROLLOUT_PRIORITY, name)


def test_rollouts_wait_while_a_user_is_there_and_keep_their_place() -> None:
    scheduler = FakeScheduler([rollout("r1"), user("u1"), rollout("r2")], [rollout("r3"), user("u2")])
    assert scheduler.schedule() == "output"
    assert scheduler.steps == [{"u1", "u2"}]
    assert {request.name for request in scheduler.running} == {"u1", "u2", "r1", "r2"}
    assert [request.name for request in scheduler.waiting] == ["r3"]
    scheduler.running = [request for request in scheduler.running if request.priority]  # the users are done
    scheduler.schedule(throttle_prefills=True)
    assert scheduler.steps[-1] == {"r1", "r2", "r3"}


def test_a_server_that_is_never_idle_lets_rollouts_end_some_day() -> None:
    scheduler = FakeScheduler([rollout("r1"), user("u1")])
    stepped_s = []
    for tenth in range(35):
        NOW[0] = tenth / 10
        scheduler.schedule()
        if "r1" in scheduler.steps[-1]:
            stepped_s.append(NOW[0])
    assert stepped_s == [LONGEST_WAIT_S, 2 * LONGEST_WAIT_S, 3 * LONGEST_WAIT_S]


def test_rollouts_that_had_their_turn_wait_anew() -> None:
    scheduler = FakeScheduler([rollout("r1")])
    NOW[0] = 10.0
    scheduler.schedule()  # nobody else is there
    scheduler.running.append(user("u1"))
    NOW[0] += 0.9 * LONGEST_WAIT_S
    scheduler.schedule()
    assert scheduler.steps == [{"r1"}, {"u1"}]


def test_new_rollouts_wait_however_long_there_were_none() -> None:
    scheduler = FakeScheduler([rollout("r1"), user("u1")])
    NOW[0] = 20.0
    scheduler.schedule()
    scheduler.running = [user("u1")]  # the trainer learns
    scheduler.schedule()
    NOW[0] += 20 * LONGEST_WAIT_S
    scheduler.waiting.add_request(rollout("r2"))
    scheduler.schedule()
    assert scheduler.steps[-1] == {"u1"}


def test_where_users_do_not_fit_beside_rollouts_vllm_decides() -> None:
    full = FakeScheduler([rollout(f"r{i}") for i in range(8)], [user("u1")])
    full.schedule()
    assert len(full.steps[0]) == 8
    short = FakeScheduler([rollout("r1"), user("u1")], [user("u2")], room=1)  # no memory: u2 is not let in
    short.schedule()
    short.schedule()
    assert short.steps == [{"u1"}, {"u1", "r1"}]
    short.schedule()
    assert short.steps[2] == {"u1"}


@pytest.mark.parametrize("policy", [SchedulingPolicy.FCFS, SchedulingPolicy.PRIORITY])
def test_other_servers_and_requests_are_left_alone(policy: SchedulingPolicy) -> None:
    alone = FakeScheduler([user("u1")], [user("u2"), Request(ROLLOUT_PRIORITY - 1, "late")], policy=policy)
    alone.schedule()
    assert alone.steps == [{"u1", "u2", "late"}]
    mixed = FakeScheduler([user("u1"), rollout("r1")], policy=SchedulingPolicy.FCFS)
    mixed.schedule()
    assert mixed.steps == [{"u1", "r1"}]


def test_a_step_that_fails_loses_nobody() -> None:
    scheduler = FakeScheduler([rollout("r1"), user("u1")], [rollout("r2")])

    def fail(_: Any) -> None:
        raise RuntimeError("out of blocks")

    with pytest.raises(RuntimeError):
        users_first(fail)(scheduler)
    assert scheduler.names == {"r1", "u1", "r2"}


def test_vllm_has_what_is_replaced() -> None:
    let_users_go_first()
    replaced = Scheduler.schedule
    let_users_go_first()
    assert Scheduler.schedule is replaced
    assert getattr(replaced, "puts_users_first", False)
