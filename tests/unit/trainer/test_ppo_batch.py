"""Log-probs and values of answers on a tiny NF4 base: against the model's own logits, in chunks, with gradients."""

from __future__ import annotations

import math
import weakref

import pytest
import torch

from scion_adapters.errors import ScionError
from scion_trainer.ppo import batch as batch_module
from scion_trainer.ppo.batch import OutputLayer, behaviour_log_probs, collate, response_hidden, spread
from scion_trainer.roles import BASE, POLICY, VALUE, Roles
from scion_trainer.rollouts.local import LocalRollouts
from scion_trainer.rollouts.types import Rollout
from tests.helpers.ppo import STOP_ID, fresh_roles
from tests.helpers.tiny_model import build_tiny_model

CPU = torch.device("cpu")
ROLLOUTS = (
    Rollout((3, 20, 21, 4), (30, 31, 0), (-1.0, -2.0, -3.0), True),
    Rollout((3, 4), (40, 41, 42, 43, 44), (-5.0,) * 5, False),
    Rollout((3, 22, 4), (0,), (-6.0,), True),
)


@pytest.fixture(scope="module")
def roles(tmp_path_factory: pytest.TempPathFactory) -> Roles:
    made = fresh_roles(build_tiny_model(tmp_path_factory.mktemp("batch") / "base"))
    generator = torch.Generator().manual_seed(0)
    made.load_state(POLICY, {n: torch.randn(t.shape, generator=generator) * 0.1 for n, t in made.state(POLICY).items()})
    made.add(VALUE)
    return made


def own_log_probs(roles: Roles, rollout: Rollout, temperature: float) -> list[float]:
    """By the model's own logits of that one sequence."""
    tokens = torch.tensor([rollout.prompt_ids + rollout.response_ids])
    with torch.no_grad(), roles.use(POLICY) as model, torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=tokens).logits[0].float() / temperature
    start = len(rollout.prompt_ids) - 1
    return [float(logits[start + i].log_softmax(0)[token]) for i, token in enumerate(rollout.response_ids)]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("chunk_bytes", [64 << 20, 1])
def test_log_probs_are_the_models_own(
    roles: Roles, monkeypatch: pytest.MonkeyPatch, temperature: float, chunk_bytes: int
) -> None:
    monkeypatch.setattr(batch_module, "LOGITS_CHUNK_BYTES", chunk_bytes)
    output = OutputLayer(roles, temperature=temperature)
    output._chunk = 2 if chunk_bytes == 1 else output._chunk
    batch = collate(ROLLOUTS, CPU)
    with roles.use(POLICY), torch.no_grad():
        found = output.log_probs(batch)
        same, entropy = output.log_probs_and_entropy(batch)
    torch.testing.assert_close(found, same)
    for row, rollout in enumerate(ROLLOUTS):
        length = len(rollout.response_ids)
        assert found[row, :length].tolist() == pytest.approx(own_log_probs(roles, rollout, temperature), abs=0.05)
        assert not found[row, length:].any()
        assert all(0 < value <= math.log(320) for value in entropy[row, :length].tolist())


def test_rows_take_their_own_columns(roles: Roles) -> None:
    batch = collate(ROLLOUTS, CPU)
    output = OutputLayer(roles, temperature=1.0)
    part = batch.rows(torch.tensor([2, 0]))
    assert (part.tokens_BT.shape, part.answers_BR.shape) == ((2, 7), (2, 3))
    with roles.use(POLICY), torch.no_grad():
        whole, few = output.log_probs(batch), output.log_probs(part)
    torch.testing.assert_close(few, whole[[2, 0], :3], atol=0.05, rtol=0.05)


def test_gradients_do_not_depend_on_the_chunks(roles: Roles) -> None:
    found = []
    for chunk in (1, 3, 1000):
        output = OutputLayer(roles, temperature=0.7)
        output._chunk = chunk
        roles.model.zero_grad()
        with roles.use(POLICY, train=True):
            output.log_probs(collate(ROLLOUTS, CPU)).sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in roles.parameters(POLICY) if p.grad is not None]))
    assert found[0].any()
    torch.testing.assert_close(found[0], found[2], atol=0.02, rtol=0.02)
    torch.testing.assert_close(found[1], found[2], atol=0.02, rtol=0.02)


def test_no_logits_of_the_rollout_are_kept_for_the_backward(roles: Roles) -> None:
    """What the forward keeps is counted: nothing as wide as the vocabulary for more than a chunk's tokens."""
    kept: weakref.WeakSet[Kept] = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> Kept:
        kept.add(one := Kept(tensor))
        return one

    output = OutputLayer(roles, temperature=1.0)
    output._chunk = 2
    with roles.use(POLICY, train=True), torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one.tensor):
        found = output.log_probs(collate(ROLLOUTS, CPU))
    shapes = [tuple(one.tensor.shape) for one in kept]
    assert found.requires_grad
    assert shapes
    assert not [shape for shape in shapes if shape[-1:] == (320,)]


class Kept:
    """A tensor that a backward will need. It goes when its graph goes."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def test_gradients_are_those_of_the_models_own_logits(roles: Roles) -> None:
    """Each token with a weight of its own, against autograd through all logits at once."""
    batch = collate(ROLLOUTS, CPU)
    weights_BR = torch.linspace(-1.0, 2.0, batch.mask_BR.numel()).view(batch.mask_BR.shape)
    found = []
    for own in (False, True):
        roles.model.zero_grad()
        with roles.use(POLICY, train=True) as model:
            if own:
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    log_probs = model(input_ids=batch.tokens_BT).logits.float().div(0.7).log_softmax(dim=-1)
                rows, columns = batch.mask_BR.nonzero(as_tuple=True)
                places = batch.prompt_lengths_B[rows] - 1 + columns
                (log_probs[rows, places, batch.answers_BR[rows, columns]] * weights_BR[rows, columns]).sum().backward()
            else:
                (OutputLayer(roles, temperature=0.7).log_probs(batch) * weights_BR).sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in roles.parameters(POLICY) if p.grad is not None]))
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 0.02  # both round to bf16 on the way


def test_a_trainable_output_layer_is_refused(roles: Roles) -> None:
    output = OutputLayer(roles, temperature=1.0)
    weight = output._layer.weight
    weight.requires_grad_(True)
    try:
        with pytest.raises(ScionError, match="trainable"):
            output.check([3, 20, 4])
    finally:
        weight.requires_grad_(False)


def test_hidden_states_of_answers_are_contiguous(roles: Roles) -> None:
    """A product with a slice that is not contiguous is several times slower in bf16 on a CPU."""
    batch = collate(ROLLOUTS, CPU)
    with roles.use(VALUE), torch.no_grad():
        hidden_ND = response_hidden(roles, batch)
        whole_BTD = roles.hidden(batch.tokens_BT)
    assert hidden_ND.is_contiguous()
    assert hidden_ND.shape == (9, 64)
    assert torch.equal(hidden_ND[3], whole_BTD[1, 1])  # predicts the first token of the second answer
    assert torch.equal(hidden_ND[8], whole_BTD[2, 2])


def test_spreading_lets_gradients_through() -> None:
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    mask = torch.tensor([[True, False], [True, True]])
    spread(values, mask).mul(torch.tensor([[1.0, 5.0], [2.0, 3.0]])).sum().backward()
    assert spread(values, mask).tolist() == [[1.0, 0.0], [2.0, 3.0]]
    assert values.grad is not None
    assert values.grad.tolist() == [1.0, 2.0, 3.0]


def test_an_unknown_way_to_make_logits_is_refused(roles: Roles) -> None:
    output = OutputLayer(roles, temperature=1.0)
    with roles.use(BASE):
        output.check([3, 20, 4])
    output._cap = 0.01  # as if the model capped its logits and we did not know how
    with pytest.raises(ScionError, match="LlamaForCausalLM: its logits differ"):
        output.check([3, 20, 4])


def test_a_long_prompt_is_checked_on_its_last_tokens(roles: Roles, monkeypatch: pytest.MonkeyPatch) -> None:
    """All logits of 900 tokens over 128,000 words, several times in fp32, would be gigabytes that nobody foresaw."""
    output, widths = OutputLayer(roles, temperature=1.0), []
    own = OutputLayer._logits
    monkeypatch.setattr(OutputLayer, "_logits", lambda self, hidden: widths.append(len(hidden)) or own(self, hidden))
    with roles.use(BASE):
        output.check([3, *range(5, 205), 4])
        output.check([3, 20, 4])
        output._cap = 0.01
        with pytest.raises(ScionError, match="its logits differ"):
            output.check([3, *range(5, 205), 4])
    assert widths == [64, 3, 64]


def test_what_the_sampler_said_is_what_the_trainer_computes(roles: Roles) -> None:
    """Prompts of different lengths, a cache, rows that leave early: and the same log-probs, but for rounding."""
    source = LocalRollouts(roles, stop_ids=[STOP_ID, *range(5, 60)], temperature=0.8, max_tokens=12)
    prompts = [(3, *range(20, 20 + n), 4) for n in (1, 9, 3, 5, 2, 7)]
    rollouts = source.sample(prompts, seed=1)
    assert [rollout.prompt_ids for rollout in rollouts] == prompts
    lengths = [len(rollout.response_ids) for rollout in rollouts]
    assert len(set(lengths)) > 2  # or nothing left early
    batch = collate(rollouts, CPU)
    with roles.use(POLICY), torch.no_grad():
        found = OutputLayer(roles, temperature=0.8).log_probs(batch)
    assert float((found - behaviour_log_probs(rollouts, CPU)).abs().max()) < 0.1
    for rollout in rollouts:
        stops = [token in {STOP_ID, *range(5, 60)} for token in rollout.response_ids]
        assert stops == [False] * (len(stops) - 1) + [rollout.finished]
        assert rollout.finished or len(stops) == 12


def test_the_seed_decides_what_is_sampled(roles: Roles) -> None:
    source = LocalRollouts(roles, stop_ids=[STOP_ID], temperature=1.0, max_tokens=4)
    prompts = [(3, 20, 4), (3, 21, 4)]
    assert source.sample(prompts, seed=1) == source.sample(prompts, seed=1)
    assert source.sample(prompts, seed=1) != source.sample(prompts, seed=2)


def test_samples_follow_the_distribution(roles: Roles) -> None:
    """The first token of 400 answers to one prompt, against the model's probabilities at the temperature."""
    source = LocalRollouts(roles, stop_ids=[STOP_ID], temperature=0.5, max_tokens=1, at_once=400)
    rollouts = source.sample([(3, 20, 4)] * 400, seed=0)
    mean_log_prob = sum(rollout.log_probs[0] for rollout in rollouts) / len(rollouts)
    with roles.use(POLICY):
        _, entropy = OutputLayer(roles, temperature=0.5).log_probs_and_entropy(collate(rollouts[:1], CPU))
    assert mean_log_prob == pytest.approx(-float(entropy[0, 0]), abs=0.15)


def test_an_empty_answer_is_no_rollout() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        collate([Rollout((3,), (), (), False)], CPU)
