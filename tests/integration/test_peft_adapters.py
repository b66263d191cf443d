"""The pre-flight check and the difference on what the real PEFT writes: good adapters pass, its variants do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scion_adapters.difference import compare_adapters
from scion_adapters.errors import RejectedError
from scion_adapters.fingerprint import BaseInfo, read_base
from scion_adapters.preflight import check_adapter
from scion_adapters.sections.serving import LORA_TARGETS
from tests.helpers.adapters import LIMITS
from tests.helpers.tiny_model import build_tiny_model


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_model(tmp_path_factory.mktemp("peft") / "base")


@pytest.fixture(scope="module")
def base(model_path: Path) -> BaseInfo:
    return read_base(model_path)


def save(model_path: Path, directory: Path, **changes: Any) -> tuple[Path, Any]:
    """A LoRA of random weights, saved by PEFT; also the model, for its deltas."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    values: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": list(LORA_TARGETS), "task_type": "CAUSAL_LM"}
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_path), LoraConfig(**{**values, **changes}))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(directory)
    return directory, model


# arguments of PEFT's LoraConfig that are served as they were trained
GOOD: list[dict[str, Any]] = [
    {},  # plain
    {"target_modules": "all-linear"},  # PEFT writes out the list
    {"target_modules": ["q_proj", "v_proj"]},  # some modules
    {"target_modules": r".*\.self_attn\.(q|v)_proj"},  # a pattern
    {"layers_to_transform": [1]},  # some layers
    {"use_rslora": True},  # another scale
    {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 32}},  # by module
    {"init_lora_weights": "gaussian"},  # another start
    {"lora_dropout": 0.1},  # only while training
]


@pytest.mark.parametrize("changes", GOOD, ids=str)
def test_what_peft_saves_passes(model_path: Path, base: BaseInfo, tmp_path: Path, changes: dict[str, Any]) -> None:
    directory, model = save(model_path, tmp_path / "adapter", **changes)
    info = check_adapter(directory, base, LIMITS)
    trainable = sum(parameter.numel() for name, parameter in model.named_parameters() if "lora_" in name)
    assert info.num_parameters == trainable


def test_the_norms_are_those_of_pefts_own_deltas(model_path: Path, tmp_path: Path) -> None:
    directory, model = save(
        model_path, tmp_path / "adapter", use_rslora=True, rank_pattern={"q_proj": 4}, alpha_pattern={"v_proj": 32}
    )
    for item in compare_adapters(None, directory):
        delta = model.get_submodule(f"base_model.model.{item.module}").get_delta_weight("default")
        assert item.norm_second == pytest.approx(delta.float().norm().item(), rel=1e-3), item.module


# arguments of PEFT's LoraConfig that vLLM refuses, ignores or serves wrongly
BAD: list[tuple[dict[str, Any], str]] = [
    ({"use_dora": True}, "unsupported_config"),  # magnitudes
    ({"bias": "all"}, "unsupported_config"),  # biases
    ({"modules_to_save": ["lm_head"]}, "unsupported_config"),  # a whole layer
    ({"trainable_token_indices": [1, 2]}, "unsupported_config"),  # embeddings
    ({"target_modules": ["q_proj", "embed_tokens"]}, "unmatched_keys"),  # an embedding
    ({"r": 17}, "rank_too_high"),  # more than the server takes
]


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # PEFT warns about several of these itself
@pytest.mark.parametrize(("changes", "reason"), BAD, ids=str)
def test_pefts_variants_are_refused(
    model_path: Path, base: BaseInfo, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    directory, _ = save(model_path, tmp_path / "adapter", **changes)
    with pytest.raises(RejectedError) as caught:
        check_adapter(directory, base, LIMITS)
    assert caught.value.reason == reason
