"""Rollouts on real vLLM, from an engine of the run's own and from a live server: contract, parity, coming and going.

Parity is what PPO rests on: the log-probs that the server reports of what it sampled are the trainer's own, on the same
NF4 base, at the sampling temperature.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import torch
from peft import PeftModel

from scion_adapters.errors import UnavailableError
from scion_adapters.fingerprint import BaseInfo, base_info
from scion_adapters.registry import open_registry
from scion_adapters.settings import Settings, load_settings
from scion_trainer.base import load_base
from scion_trainer.chat_tokens import load_chat_tokens
from scion_trainer.rollouts.choice import ChosenSource, Place
from scion_trainer.rollouts.engine import EngineSource
from scion_trainer.rollouts.sampling import Sampling
from scion_trainer.rollouts.server import ServerSource
from scion_trainer.rollouts.types import Rollout, RolloutSource
from tests.e2e.conftest import ServerWorld
from tests.helpers.adapters import Tensors, make_adapter
from tests.helpers.rollout_contract import SOURCE_CONTRACT, SourceSubject
from tests.helpers.serving import DEMO_BASE, Server, to_toml
from tests.helpers.waiting import wait_for

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

BOUND = 0.02
"""Nats: mean |log p(sampler) - log p(trainer)| over tokens."""
SAMPLING = Sampling(24, 1.4)
MAX_LENGTH = 256


def make_loud(tensors: Tensors) -> None:
    """Weights that move log-probs by about a nat, as training does."""
    for tensor in tensors.values():
        tensor *= 4


class Policies:
    """Steps of a policy: files that are gone once a source has them, as PPO's are."""

    def __init__(self, directory: Path, base: BaseInfo) -> None:
        self._directory = directory
        self._base = base
        self._count = 0

    def make(self) -> Path:
        self._count += 1
        directory = self._directory / f"policy-{self._count}"
        return make_adapter(directory, self._base, rank=16, alpha=32, seed=self._count, edit=make_loud)


@pytest.fixture(scope="module")
def prompts(world: ServerWorld) -> list[list[int]]:
    tokens = load_chat_tokens(world.server.settings)
    places = ("France", "Peru", "Japan", "Kenya", "Norway", "Chile", "India", "Egypt")
    return [list(tokens.prompt([{"role": "user", "content": f"Tell me of {place}."}])) for place in places]


def eos_ids(settings: Settings) -> frozenset[int]:
    return load_chat_tokens(settings).stop_ids()


def difference(settings: Settings, adapter: Path, rollouts: list[Rollout], temperature: float) -> float:
    """Mean |Δ log-prob| over all sampled tokens, the trainer's computed as runs compute them."""
    model: Any = PeftModel.from_pretrained(load_base(settings).model, str(adapter)).eval()
    found = []
    with torch.inference_mode():
        for rollout in rollouts:
            logits = model(torch.tensor([[*rollout.prompt_ids, *rollout.response_ids]])).logits[0].float()
            scores = (logits / temperature).log_softmax(-1)[len(rollout.prompt_ids) - 1 : -1]
            own = scores.gather(1, torch.tensor(rollout.response_ids).unsqueeze(1)).squeeze(1)
            found.append(np.abs(own.numpy() - np.asarray(rollout.log_probs)))
    return float(np.concatenate(found).mean())


# --- an engine of the run's own --------------------------------------------------------------------------------------


class EngineWorld:
    """One engine for all tests of this part, which leave it usable."""

    def __init__(self, home: Path) -> None:
        home.mkdir(exist_ok=True)
        (home / "scion.toml").write_text(to_toml({"base": {"model": str(DEMO_BASE)}}, ["chat"]))
        self.settings = load_settings(home / "scion.toml")
        self.base = base_info(self.settings)
        self.policies = Policies(home, self.base)
        self.said: list[str] = []
        self.home = home / "engine"
        self.source = EngineSource(
            self.settings, self.base, SAMPLING, self.home, actor="test", max_length=MAX_LENGTH, say=self.said.append
        )

    def processes(self) -> list[psutil.Process]:
        """The engine's: those with its home as their folder."""
        found = []
        for process in psutil.Process().children(recursive=True):
            try:
                if process.cwd() == str(self.home):
                    found.append(process)
            except psutil.Error:
                continue
        return found


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineWorld]:
    world = EngineWorld(tmp_path_factory.mktemp("engine"))
    world.source.update(world.policies.make(), 0)
    yield world
    world.source.close()
    assert not world.home.exists()
    wait_for(lambda: not world.processes(), "the end of the engine")


@pytest.mark.parametrize("check", SOURCE_CONTRACT, ids=lambda check: check.__name__)
def test_an_engine_of_its_own_keeps_the_contract(
    engine: EngineWorld, prompts: list[list[int]], check: Callable[[SourceSubject], None]
) -> None:
    check(SourceSubject(engine.source, prompts, SAMPLING.max_new_tokens, eos_ids(engine.settings)))


def test_prompts_that_take_several_steps_of_the_engine_keep_their_seeds_and_do_not_kill_it(
    engine: EngineWorld, prompts: list[list[int]]
) -> None:
    """Together they are more than vLLM reads in one step (2,048 tokens on a CPU), so that one is cut in two."""
    long = [(prompt * 20)[:200] for prompt in prompts] * 2
    together = engine.source.sample(long, seed=9)
    again = engine.source.sample(long, seed=9)
    assert not any("again" in line for line in engine.said)
    same = sum(a.response_ids == b.response_ids for a, b in zip(together, again, strict=True))
    assert same >= len(long) / 2


def test_each_step_answers_with_its_own_adapter_and_the_trainer_agrees(
    engine: EngineWorld, prompts: list[list[int]]
) -> None:
    first, second = engine.policies.make(), engine.policies.make()
    engine.source.update(first, 1)
    engine.source.sample(prompts, seed=0)
    engine.source.update(second, 2)
    rollouts = engine.source.sample(prompts, seed=0)
    own, other = (difference(engine.settings, policy, rollouts, SAMPLING.temperature) for policy in (second, first))
    raw = difference(engine.settings, second, rollouts, 1.0)
    print(
        f"\nmean |d log-prob|: {own:.4f} with its adapter, {other:.2f} with the last step's, {raw:.2f} at temperature 1"
    )
    assert own <= BOUND
    assert other > 5 * BOUND, "an answer of the step before would be told apart"
    assert raw > 2 * BOUND, "log-probs before temperature would be told apart"


def test_the_engine_holds_no_more_than_the_present_step(engine: EngineWorld) -> None:
    for step in range(3, 9):  # more than it has slots
        engine.source.update(engine.policies.make(), step)
    status = httpx.get(f"{engine.source.url}/v1/scion/status", trust_env=False)

    def resident() -> list[str]:
        return [entry["version"] for entry in status_of(engine.source.url)["resident"]]

    assert status.status_code == 200
    wait_for(lambda: len(resident()) == 1 and not status_of(engine.source.url)["leaving"], "that old steps are removed")


def status_of(url: str) -> dict[str, Any]:
    return dict(httpx.get(f"{url}/v1/scion/status", trust_env=False).json())


def test_an_engine_that_is_killed_is_started_again_with_the_present_step(
    engine: EngineWorld, prompts: list[list[int]]
) -> None:
    policy = engine.policies.make()
    engine.source.update(policy, 20)
    for process in engine.processes():
        process.kill()
    rollouts = engine.source.sample(prompts, seed=0)
    assert difference(engine.settings, policy, rollouts, SAMPLING.temperature) <= BOUND
    assert engine.said[-1] == "starting the engine for rollouts again"


def test_under_auto_the_trainer_takes_over_when_no_engine_can_be_had(
    engine: EngineWorld, prompts: list[list[int]], tmp_path: Path
) -> None:
    class Local:
        def sample(self, prompts: Any, *, seed: int) -> list[Rollout]:
            return [Rollout(tuple(prompt), (1,), (-1.0,), False) for prompt in prompts]

        def update(self, adapter_directory: Path, step: int) -> None: ...

        def close(self) -> None: ...

    def make(place: Place) -> RolloutSource:
        if place is Place.LOCAL:
            return Local()
        command = [sys.executable, "-c", "raise SystemExit('no memory for an engine')"]
        return EngineSource(
            engine.settings,
            engine.base,
            SAMPLING,
            tmp_path / "engine",
            actor="test",
            max_length=MAX_LENGTH,
            command=command,
        )

    said: list[str] = []
    chosen = ChosenSource([Place.ENGINE, Place.LOCAL], make, said.append)
    chosen.update(engine.policies.make(), 0)
    assert len(chosen.sample(prompts, seed=0)) == len(prompts)
    assert any("no memory for an engine" in line for line in said)


# --- a live server ---------------------------------------------------------------------------------------------------


def test_a_server_that_is_not_for_rollouts_says_so(world: ServerWorld) -> None:
    settings = world.server.settings
    source = ServerSource(settings, world.registry, base_info(settings), SAMPLING, actor="test", concurrency=4)
    with pytest.raises(UnavailableError, match=r"server\.ppo_rollouts = true"):
        source.update(Policies(world.server.home, base_info(settings)).make(), 0)
    assert not [name for name in world.registry.adapters() if name.startswith("steps-")]


@contextmanager
def users_asking(url: str) -> Iterator[list[int]]:
    """One user after the other asks the server while this is open; the status of each answer."""
    statuses: list[int] = []
    begun, stop = threading.Event(), threading.Event()

    def ask() -> None:
        while not stop.is_set():
            messages = [{"role": "user", "content": f"What is the capital of France, question {len(statuses)}?"}]
            body = {"model": "chat", "messages": messages, "max_tokens": 8}
            answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60, trust_env=False)
            statuses.append(answer.status_code)
            begun.set()

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        assert begun.wait(60)
        yield statuses
    finally:
        stop.set()
        thread.join()


def test_a_live_server_at_low_priority(prompts: list[list[int]], tmp_path: Path) -> None:
    threads = max(1, len(os.sched_getaffinity(0)) - 1)
    server = Server.make(tmp_path / "live", threads=threads, config={"server": {"ppo_rollouts": True}})
    settings = server.settings
    registry, base = open_registry(settings), base_info(settings)
    policies = Policies(tmp_path, base)
    with server:
        source = ServerSource(settings, registry, base, SAMPLING, actor="test", concurrency=4)
        first, second = policies.make(), policies.make()
        source.update(first, 0)
        for check in SOURCE_CONTRACT:
            check(SourceSubject(source, prompts, SAMPLING.max_new_tokens, eos_ids(settings)))
        source.update(second, 1)
        with users_asking(server.url) as statuses:  # rollouts are left out of steps, and go on where they were
            rollouts = source.sample(prompts, seed=1)
        assert set(statuses) == {200}
        own = difference(settings, second, rollouts, SAMPLING.temperature)
        print(f"\nlive server, mean |d log-prob|: {own:.4f}")
        assert own <= BOUND
        assert difference(settings, first, rollouts, SAMPLING.temperature) > 5 * BOUND

        models = [card["id"] for card in httpx.get(f"{server.url}/v1/models", trust_env=False).json()["data"]]
        assert not [name for name in models if name.startswith("steps-")], "users do not see steps"
        (line,) = [name for name in registry.adapters() if name.startswith("steps-")]
        body = {"model": f"{line}:2", "prompt": "Hi", "max_tokens": 1}
        assert httpx.post(f"{server.url}/v1/completions", json=body, trust_env=False).status_code == 404

        source.close()
        wait_for(lambda: status_of(server.url)["resident"] == [], "that the server let go of the steps")
        assert registry.adapters() == ["chat"]
    registry.database.dispose()
