"""The base as the server holds it: NF4 with double quantization, computing in bf16.

Owns loading, and the workaround for the bitsandbytes kernel that spoils gradients on AVX512-BF16 CPUs. It knows nothing
of adapters, ratings or runs.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import bitsandbytes
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from scion_adapters.errors import InvalidInputError
from scion_adapters.settings import Settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadedBase:
    """A frozen model and its tokenizer. Both are transformers objects."""

    model: Any
    tokenizer: Any


def default_device() -> torch.device:
    """The first GPU, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def base_location(settings: Settings) -> str:
    """What transformers is asked to load: a local directory, else a Hugging Face id."""
    return str(settings.base_path or settings.base.model)


def load_tokenizer(settings: Settings) -> Any:
    """The base's tokenizer. Raises InvalidInputError when there is none, or when it has no chat template."""
    location = base_location(settings)
    try:
        tokenizer = AutoTokenizer.from_pretrained(location)
    except (OSError, ValueError) as error:
        raise InvalidInputError(
            f"base.model = {location!r}: no tokenizer could be loaded ({first_line(error)}); "
            "name a directory with a model and its tokenizer, or a Hugging Face id",
            field="base.model",
        ) from error
    if not tokenizer.chat_template:
        raise InvalidInputError(
            f"base.model = {location!r}: its tokenizer has no chat template, so chats cannot be turned into tokens; "
            "use an instruction-tuned base, or add chat_template.jinja beside the tokenizer",
            field="base.model",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(settings: Settings, *, device: torch.device | None = None) -> LoadedBase:
    """The configured base on `device` (None: see `default_device`), frozen, in training precision.

    Raises InvalidInputError when it cannot be loaded; MemoryError passes through.
    """
    device = device or default_device()
    if settings.trainer.threads is not None and device.type == "cpu":
        torch.set_num_threads(settings.trainer.threads)
    tokenizer = load_tokenizer(settings)
    location = base_location(settings)
    quantization = nf4_config() if settings.base.quantization == "nf4" else None
    try:
        with _quiet_loading():
            model = AutoModelForCausalLM.from_pretrained(
                location, dtype=torch.bfloat16, quantization_config=quantization, device_map={"": device}
            )
    except (OSError, ValueError) as error:
        raise InvalidInputError(
            f"base.model = {location!r} could not be loaded: {first_line(error)}", field="base.model"
        ) from error
    model.requires_grad_(False)
    protect_gradients(model)
    return LoadedBase(model, tokenizer)


def nf4_config() -> BitsAndBytesConfig:
    """What `--quantization bitsandbytes` gives in the server: NF4, double quantization, bf16 compute."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def protect_gradients(model: torch.nn.Module) -> int:
    """Keep bitsandbytes from repacking the weights of `model`; returns how many layers that concerned.

    bitsandbytes 0.50 repacks a Linear4bit in place at its first forward in eval mode on a CPU with AVX512-BF16, and
    its backward then reads the repacked bytes as if they were not: LoRA gradients turn wrong (cosine to the true ones
    down to 0.26) while the loss looks normal. The plain kernels are exact, and faster in training. Delete this once a
    release of bitsandbytes passes tests/unit/trainer/test_base_gradients.py without it.
    """
    layers = [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
    return len(layers)


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """No progress bar of transformers' own: a run shows one progress, and in a daemon's log there is none."""
    was_shown = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|bitsandbytes|torch)\b.*")
            yield
    finally:
        if was_shown:
            transformers.utils.logging.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """The first line of what an error says, for messages of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
