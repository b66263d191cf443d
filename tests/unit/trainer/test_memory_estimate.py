from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from trl.kernels import chunked_logprob
from trl.trainer import utils as trl_utils

from scion_adapters.fingerprint import BaseInfo
from scion_adapters.settings import Settings
from scion_trainer.config import RunConfig, run_config
from scion_trainer.memory import (
    GIB,
    RUNTIME_BYTES,
    TILE_TOKENS,
    TILE_VOCAB,
    Estimate,
    OutOfMemoryError,
    Output,
    available_bytes,
    cgroup_available,
    check_fits,
    estimate,
    output_bytes,
)

CONFIG: RunConfig = run_config(Settings(), "sft")


def llama_8b() -> BaseInfo:
    """The shapes of Llama 3.1 8B."""
    shapes = {
        "self_attn.q_proj": (4096, 4096),
        "self_attn.k_proj": (1024, 4096),
        "self_attn.v_proj": (1024, 4096),
        "self_attn.o_proj": (4096, 4096),
        "mlp.gate_proj": (14336, 4096),
        "mlp.up_proj": (14336, 4096),
        "mlp.down_proj": (4096, 14336),
    }
    modules = {f"model.layers.{layer}.{name}": shape for layer in range(32) for name, shape in shapes.items()}
    return BaseInfo(fingerprint="sha256:0", modules=modules, vocab_size=128_256, num_layers=32)


def of_8b(
    *, micro: int = 2, tokens: int = 1024, rank: int = 16, quantized: bool = True, device: str = "cpu"
) -> Estimate:
    return estimate(
        llama_8b(),
        CONFIG,
        quantized=quantized,
        rank=rank,
        micro_batch_size=micro,
        longest_tokens=tokens,
        device_type=device,
    )


def test_known_sizes_of_an_8b() -> None:
    found = of_8b()
    assert found.base_bytes / GIB == pytest.approx(5.3, abs=0.4)  # 6.98e9 weights at 4.1 bits, 2.1 GB of embeddings
    assert found.adapter_bytes / GIB == pytest.approx(0.625, abs=0.01)  # 41.9e6 parameters, 16 bytes each
    assert found.gradient_checkpointing
    assert found.total_bytes < 12 * GIB  # an 8B trains on a 16 GB card


@pytest.mark.parametrize(
    ("more", "less"),
    [
        (of_8b(micro=4), of_8b(micro=2)),
        (of_8b(tokens=2048), of_8b(tokens=1024)),
        (of_8b(rank=64), of_8b(rank=16)),
        (of_8b(quantized=False), of_8b(quantized=True)),
    ],
)
def test_what_needs_more_is_estimated_higher(more: Estimate, less: Estimate) -> None:
    assert more.total_bytes > less.total_bytes


def test_a_gpu_holds_no_libraries_and_one_small_tile() -> None:
    here, gpu = of_8b(), of_8b(device="cuda")
    assert (here.runtime_bytes, gpu.runtime_bytes) == (RUNTIME_BYTES, 0)
    assert (gpu.base_bytes, gpu.adapter_bytes) == (here.base_bytes, here.adapter_bytes)
    assert here.activation_bytes - gpu.activation_bytes == 2048 * 32_768 * (31 - 2)
    assert output_bytes(Output.TILES, 100, 500, 64, "cuda") == 100 * 32_768 * 2  # as wide as TRL's, whatever is in it


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_more_positions_and_more_words_than_a_tile_has_take_no_more(device: str) -> None:
    tile = output_bytes(Output.TILES, 4096, 32_768, 4096, device)
    assert output_bytes(Output.TILES, 16_384, 128_256, 4096, device) == tile
    assert tile == 4096 * 32_768 * (2 if device == "cuda" else 31)


def test_few_tokens_are_outweighed_by_the_output_layer_in_fp32() -> None:
    """2.0 GiB of an 8B's 128,256 words would be, and it is the 32,768 of a tile."""
    assert output_bytes(Output.TILES, 16, 128_256, 4096, "cpu") == 32_768 * (4096 * 4 + 16 * 6)


def test_the_tiles_are_those_of_the_trl_that_is_installed() -> None:
    assert TILE_TOKENS == chunked_logprob.TOKEN_CHUNK_SIZE
    assert TILE_VOCAB == trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE


def test_only_the_adapted_modules_count() -> None:
    few = replace(CONFIG, target_modules=("q_proj",))
    found = estimate(llama_8b(), few, quantized=True, rank=16, micro_batch_size=2, longest_tokens=8)
    assert found.adapter_bytes == 32 * 16 * (4096 + 4096) * 16


def test_what_does_not_fit_is_refused_with_numbers_and_remedy() -> None:
    needed = of_8b()
    check_fits(needed, needed.total_bytes, micro_batch_size=2, longest_tokens=1024)
    with pytest.raises(OutOfMemoryError) as caught:
        check_fits(needed, 4 * GIB, micro_batch_size=2, longest_tokens=1024)
    for part in ("4.00 GiB are available", "2 examples", "1024 tokens", "trainer.micro_batch_size"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("files", "available"),
    [
        ({"memory.max": "1000\n", "memory.current": "300\n"}, 700),  # cgroup 2
        ({"memory.max": "max\n", "memory.current": "300\n"}, 1 << 62),  # no limit
        ({"memory/memory.limit_in_bytes": "500\n", "memory/memory.usage_in_bytes": "600\n"}, 0),  # cgroup 1, over it
        ({}, 1 << 62),  # not Linux
    ],
)
def test_a_containers_limit_is_read(tmp_path: Path, files: dict[str, str], available: int) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cgroup_available(tmp_path) == available


def test_this_machine_has_some() -> None:
    assert 0 < available_bytes() < 1 << 50
