"""The prediction per recipe, and what is proposed where a run does not fit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from scion_adapters.fingerprint import BaseInfo
from scion_adapters.settings import Settings
from scion_trainer import estimation
from scion_trainer.config import run_config
from scion_trainer.estimation import Request, ensure_fits, look
from scion_trainer.memory import GIB, OutOfMemoryError, cache_bytes


def llama(hidden: int = 4096, layers: int = 32) -> BaseInfo:
    """The shapes of Llama 3.1 8B."""
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden // 4, hidden),
        "self_attn.v_proj": (hidden // 4, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (hidden * 7 // 2, hidden),
        "mlp.up_proj": (hidden * 7 // 2, hidden),
        "mlp.down_proj": (hidden, hidden * 7 // 2),
    }
    modules = {f"model.layers.{layer}.{name}": shape for layer in range(layers) for name, shape in shapes.items()}
    return BaseInfo(fingerprint="sha256:0", modules=modules, vocab_size=128_256, num_layers=layers)


def request(recipe: str, *, base: BaseInfo | None = None, has_parent: bool = False, **config: Any) -> Request:
    frozen = replace(run_config(Settings(), recipe), **config)
    return Request(base or llama(), frozen, True, 16, 1024, has_parent)


def total(recipe: str, **changes: Any) -> int:
    return look(request(recipe, **changes), 1 << 60).predicted.total_bytes


def test_recipes_differ_by_what_they_hold() -> None:
    adapter = 41.9e6  # LoRA weights of rank 16
    same: dict[str, Any] = {"batch_size": 2}
    assert total("kto", **same) - total("sft", **same) == pytest.approx(adapter * 4, rel=0.01)  # TRL's reference
    pair, thumb = look(request("dpo", **same), 0).predicted, look(request("sft", **same), 0).predicted
    assert pair.activation_bytes == pytest.approx(2 * thumb.activation_bytes, rel=0.01)
    assert total("reward", **same) < total("dpo", **same)  # no logits, though it holds three members
    ppo = look(request("ppo", **same), 0).predicted
    assert ppo.adapter_bytes == pytest.approx(adapter * (2 * 16 + 3 * 4), rel=0.01)  # policy, value; three members
    assert look(
        request("ppo", has_parent=True, **same), 0
    ).predicted.adapter_bytes - ppo.adapter_bytes == pytest.approx(adapter * 4, rel=0.01)  # and the reference


def test_ppo_holds_the_logits_of_one_chunk_only() -> None:
    """All at once they would take 128,256 * 10 bytes a token, more than all else."""
    few, many = (
        look(request("ppo", batch_size=64, micro_batch_size=size), 0).predicted.activation_bytes for size in (1, 2)
    )
    tokens = 1024 + int(run_config(Settings(), "ppo").options["max_tokens"])
    assert many - few < tokens * 128_256 * 10 / 2


@pytest.mark.parametrize("recipe", ["sft", "distill", "kto", "dpo", "reward", "ppo"])
def test_the_device_that_a_run_trains_on_is_the_one_it_is_predicted_for(
    monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    monkeypatch.setattr(estimation, "available_bytes", lambda _device: 1 << 60)
    here, gpu = (ensure_fits(request(recipe, batch_size=2), device) for device in ("cpu", "cuda"))
    tile = {"sft": 1, "distill": 1, "kto": 1, "dpo": 2}.get(recipe, 0)
    tokens = 2 * (1024 + (int(run_config(Settings(), recipe).options["max_tokens"]) if recipe == "distill" else 0))
    assert here.activation_bytes - gpu.activation_bytes == tile * tokens * 32_768 * 29
    assert here.runtime_bytes > gpu.runtime_bytes == 0


def test_the_cache_of_sampled_answers_is_what_a_llama_keeps() -> None:
    assert cache_bytes(llama()) == 2 * 32 * 2 * 1024  # keys and values of 8 heads of 128 in 32 layers, bf16
    fused = BaseInfo("sha256:0", {"h.0.attn.c_attn": (3 * 768, 768)}, 50_257, 12)
    assert cache_bytes(fused) == 2 * 12 * 2 * 768


@pytest.mark.parametrize(
    ("recipe", "available_gib", "said"),
    [
        ("sft", 200, None),
        ("sft", 16, "it fits with trainer.micro_batch_size = 8 ("),  # nothing else changes
        ("kto", 9, "it fits with trainer.micro_batch_size = 2, trainer.max_length = 512 ("),  # KTO needs two
        ("sft", 5, "no micro-batch, length or rank fits"),
    ],
)
def test_what_fits_is_proposed_and_does_fit(recipe: str, available_gib: int, said: str | None) -> None:
    wanted = request(recipe)
    outlook = look(wanted, available_gib * GIB)
    if said is None:
        assert outlook.remedy is None
        return
    assert outlook.remedy is not None
    assert outlook.remedy.startswith(said)
    if "it fits" in said:
        numbers = dict(part.split(" = ") for part in outlook.remedy[13:].split(" (")[0].split(", "))
        micro, length = int(numbers["trainer.micro_batch_size"]), int(numbers.get("trainer.max_length", 1024))
        assert wanted.predict(micro, length, 16).total_bytes <= available_gib * GIB


def test_a_parents_rank_is_not_proposed_away() -> None:
    enough = look(replace(request("sft"), rank=4), 0).request.predict(1, 128, 4).total_bytes
    huge = replace(request("sft"), rank=256)
    assert "trainer.lora.rank = 16" in (look(huge, enough + 1).remedy or "")
    assert "no micro-batch, length or rank fits" in (look(replace(huge, has_parent=True), enough + 1).remedy or "")


def test_a_run_that_cannot_fit_is_refused_with_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimation, "available_bytes", lambda _device: 16 * GIB)
    with pytest.raises(
        OutOfMemoryError, match=r"needs about 17\..*16\.00 GiB are available: it fits with trainer\.micro"
    ):
        ensure_fits(request("sft"), "cpu")
