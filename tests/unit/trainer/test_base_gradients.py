"""bitsandbytes on AVX512-BF16 CPUs: without `protect_gradients`, a forward in eval mode spoils every later gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from scion_adapters.errors import InvalidInputError
from scion_adapters.settings import Settings, load_settings
from scion_trainer import base as base_module
from scion_trainer.base import load_base
from scion_trainer.config import run_config
from scion_trainer.lora import start_adapter
from tests.helpers.tiny_model import build_tiny_model


def cpu_has_avx512_bf16() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.is_file() and "avx512_bf16" in cpuinfo.read_text()


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    # 128 wide: bitsandbytes repacks only weights whose shape its kernel takes
    base = build_tiny_model(tmp_path_factory.mktemp("gradients") / "base", hidden=128)
    return load_settings(overrides={"base": {"model": str(base)}, "trainer": {"threads": 1}})


def gradient(model: Any) -> torch.Tensor:
    """Of a fixed loss with respect to the LoRA's B, all of it in one vector."""
    model.train()
    model.zero_grad()
    tokens_BT = torch.arange(5, 69).reshape(2, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(input_ids=tokens_BT, labels=tokens_BT).loss.backward()
    return torch.cat([p.grad.flatten() for name, p in model.named_parameters() if "lora_B" in name])


def cosine_after_eval_forward(settings: Settings) -> float:
    model, _ = start_adapter(load_base(settings, device=torch.device("cpu")), run_config(settings, "kto"), None)
    before = gradient(model)
    model.eval()
    with torch.no_grad():
        model(input_ids=torch.arange(5, 37).reshape(1, 32))
    return float(torch.nn.functional.cosine_similarity(before, gradient(model), dim=0))


def test_gradients_survive_a_forward_in_eval_mode(settings: Settings) -> None:
    assert cosine_after_eval_forward(settings) > 0.999


@pytest.mark.filterwarnings("ignore:bitsandbytes..gemv_4bit:UserWarning")  # torch noticing the bug, on some paths
@pytest.mark.skipif(not cpu_has_avx512_bf16(), reason="the bug is in the AVX512-BF16 kernels")
def test_without_the_protection_they_do_not(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other test can fail. When this one does, bitsandbytes was mended: see `protect_gradients`."""
    monkeypatch.setattr(base_module, "protect_gradients", lambda model: 0)
    assert cosine_after_eval_forward(settings) < 0.9


def test_every_quantized_layer_is_protected(settings: Settings) -> None:
    loaded = load_base(settings, device=torch.device("cpu"))
    assert base_module.protect_gradients(loaded.model) == 2 * 7  # layers times linears; embeddings and head stay bf16
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_a_missing_base_is_said_so() -> None:
    nowhere = load_settings(overrides={"base": {"model": "/nowhere/at/all"}})
    with pytest.raises(InvalidInputError, match=r"base\.model = '/nowhere/at/all'"):
        load_base(nowhere)


def test_a_base_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    base = build_tiny_model(tmp_path / "base")
    (base / "chat_template.jinja").unlink()
    with pytest.raises(InvalidInputError, match="no chat template"):
        load_base(load_settings(overrides={"base": {"model": str(base)}}))
