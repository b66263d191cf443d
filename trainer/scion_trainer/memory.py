"""Memory before time: what a run will need at its peak, and what there is, before anything large is loaded.

Owns the estimate, as pure arithmetic on the base's shapes, and the reading of what is available (machine and cgroup).
The estimate is meant to be right within a factor of about 1.5 and to refuse only what cannot fit.
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

import psutil

from scion_adapters.errors import UnavailableError
from scion_adapters.fingerprint import BaseInfo
from scion_trainer.config import RunConfig
from scion_trainer.defaults import hidden_size
from scion_trainer.ppo.options import LOGITS_CHUNK_BYTES

GIB = 1 << 30
RUNTIME_BYTES = 900 << 20
"""torch, transformers, TRL and the tokenizer before any weight is loaded: 0.7 to 0.95 GiB measured on the CPU build.
They lie in the machine's memory, so a run on a GPU takes none of it there."""
NF4_BYTES_PER_WEIGHT = 0.5 + 0.127 / 8
"""4 bits, plus double-quantized scales: 0.127 bits per weight (Dettmers et al., 2023, arXiv 2305.14314, section 3)."""
CHECKPOINTING_ABOVE_BYTES = 1 * GIB
"""Activations larger than this are recomputed in the backward (a fifth slower) instead of kept."""

_TRAINED_BYTES = 4 + 4 + 4 + 4  # per LoRA weight: itself, its gradient and Adam's two moments, all fp32
_FROZEN_BYTES = 4
_KEPT_PER_WEIGHT_ROW = 2  # a linear layer keeps its bf16 input; attention and norms are covered by ACTIVATION_SLACK
_ACTIVATION_SLACK = 2.5
_LOGIT_BYTES = 2 + 4 + 4  # bf16 logits, their fp32 copy and its gradient
_PPO_CHUNK_BYTES = LOGITS_CHUNK_BYTES // 4 * (_LOGIT_BYTES + 4)  # and their log softmax

# TRL takes positions to the vocabulary in bf16 tiles of at most this, and once more in the backward
# (trl/kernels/chunked_logprob.py, trl/trainer/utils.py).
TILE_TOKENS, TILE_VOCAB = 4096, 32_768
_TILE_BYTES = 2
_TILE_BYTES_IN_TORCH = 31
"""Without Triton: in the backward, the tile, seven fp32 arrays of its size and one of truth values."""


DEFAULT_REWARD_MEMBERS = 3
SAMPLED_PER_TRAINED = 4
"""Answers that PPO samples at once for each that it trains on at once (recipes/ppo.py)."""
SHORTEST_TOKENS = 128
"""No shorter trainer.max_length is proposed: hardly a chat would be left."""
GENERAL_REMEDY = "lower trainer.micro_batch_size or trainer.max_length, stop other processes, or use a larger machine"


class OutOfMemoryError(UnavailableError, MemoryError):
    """The run does not fit into memory, or was killed for that."""


class Output(Enum):
    """How hidden states become what a recipe's loss is made of."""

    TILES = auto()  # log-probs over the vocabulary, by TRL
    CHUNKS = auto()  # log-probs over the vocabulary, by ppo/batch.py
    SCORE = auto()  # one number, of a reward model


@dataclass(frozen=True, slots=True)
class Demand:
    """What a recipe holds beside the base, apart from rank, batch and lengths."""

    sequences: int = 1  # of one example in memory: a pair has two
    trained: int = 1  # adapters with gradients and moments
    frozen: int = 0  # adapters as weights only
    output: Output = Output.TILES
    sampled: int = 0  # answers sampled at once for each example in memory, each with its key-value cache
    extra_tokens: int = 0  # longer than the longest example: an answer of the policy's own


def demand(config: RunConfig, *, has_parent: bool) -> Demand:
    """What `config.recipe` holds. With a parent, the reference of PPO is an adapter of its own, else it is the base."""
    members = int(config.options.get("members", DEFAULT_REWARD_MEMBERS))
    answer = int(config.options.get("max_tokens", 0))
    match config.recipe:
        case "kto":
            return Demand(frozen=1)  # TRL's copy of the parent, while the reference's log-probs are taken
        case "dpo":
            return Demand(sequences=2, frozen=1)
        case "reward":
            return Demand(sequences=2, frozen=members, output=Output.SCORE)  # the policy and all members but one
        case "ppo":
            return Demand(
                trained=2,
                frozen=members + has_parent,
                output=Output.CHUNKS,
                sampled=SAMPLED_PER_TRAINED,
                extra_tokens=answer,
            )
        case "distill":
            return Demand(frozen=members, extra_tokens=answer)  # the reward model that filters
        case _:
            return Demand()


@dataclass(frozen=True, slots=True)
class Estimate:
    """Peak bytes of a run, by what takes them."""

    base_bytes: int
    adapter_bytes: int
    activation_bytes: int
    runtime_bytes: int
    gradient_checkpointing: bool

    @property
    def total_bytes(self) -> int:
        return self.base_bytes + self.adapter_bytes + self.activation_bytes + self.runtime_bytes


def estimate(
    base: BaseInfo,
    config: RunConfig,
    *,
    quantized: bool,
    rank: int,
    micro_batch_size: int,
    longest_tokens: int,
    has_parent: bool = False,
    device_type: str = "cpu",
) -> Estimate:
    """What a run takes at its peak, of the GPU for "cuda", else of the machine.

    `longest_tokens` is the longest example, prompt and answer together.
    """
    needs = demand(config, has_parent=has_parent)
    linear = sum(out * inner for out, inner in base.modules.values())
    hidden = hidden_size(base)
    embeddings = 2 * base.vocab_size * hidden * 2  # input and output, bf16; tied ones are counted twice
    base_bytes = int(linear * (NF4_BYTES_PER_WEIGHT if quantized else 2)) + embeddings
    targets = [shape for name, shape in base.modules.items() if name.rsplit(".", 1)[-1] in config.target_modules]
    weights = sum(rank * (out + inner) for out, inner in targets)
    adapter_bytes = weights * (needs.trained * _TRAINED_BYTES + needs.frozen * _FROZEN_BYTES)
    length = longest_tokens + needs.extra_tokens
    tokens = micro_batch_size * needs.sequences * length
    inputs = sum(inner for _, inner in base.modules.values())
    kept = int(tokens * inputs * _KEPT_PER_WEIGHT_ROW * _ACTIVATION_SLACK)
    checkpointing = kept > CHECKPOINTING_ABOVE_BYTES
    if checkpointing:  # one hidden state per layer, and one layer at a time in full
        kept = kept // max(1, base.num_layers) + tokens * hidden * 2 * base.num_layers
    training = kept + output_bytes(needs.output, tokens, base.vocab_size, hidden, device_type)
    sampling = min(config.batch_size, needs.sampled * micro_batch_size) * (
        length * cache_bytes(base) + base.vocab_size * _LOGIT_BYTES
    )
    runtime_bytes = 0 if device_type == "cuda" else RUNTIME_BYTES
    return Estimate(base_bytes, adapter_bytes, max(training, sampling), runtime_bytes, checkpointing)


def output_bytes(output: Output, tokens: int, vocab_size: int, hidden: int, device_type: str) -> int:
    """Of the way from `tokens` hidden states to the loss and back, at its peak.

    On a GPU TRL computes the answers' positions only, of which there are at most `tokens`, in a tile as wide as
    TILE_VOCAB even if the vocabulary is not, and its kernels change that in place. On a CPU it computes all positions,
    in torch; for few tokens the product of the gradient with the fp32 weights is what takes most.
    """
    match output:
        case Output.SCORE:
            return 0
        case Output.CHUNKS:
            return min(tokens * vocab_size * _LOGIT_BYTES, _PPO_CHUNK_BYTES)
        case Output.TILES if device_type == "cuda":
            return min(tokens, TILE_TOKENS) * TILE_VOCAB * _TILE_BYTES
        case Output.TILES:
            columns = min(vocab_size, TILE_VOCAB)
            cells = min(tokens, TILE_TOKENS) * columns
            return max(cells * _TILE_BYTES_IN_TORCH, cells * (_TILE_BYTES + 4) + columns * hidden * 4)


def cache_bytes(base: BaseInfo) -> int:
    """Of the key-value cache for one token, in bf16: what the layers' key and value projections give."""
    projections = sum(out for name, (out, _) in base.modules.items() if name.endswith(("k_proj", "v_proj")))
    return 2 * (projections or 2 * hidden_size(base) * base.num_layers)  # fused projections: at most this


def largest_fitting(
    predict: Callable[[int, int, int], Estimate],
    available: int,
    *,
    micro_batches: Sequence[int],
    tokens: int,
    ranks: Sequence[int],
) -> tuple[int, int, int] | None:
    """(micro-batch, tokens, rank) to propose where the wanted one is too large; None when nothing sensible fits.

    `predict` takes these three. The micro-batch is lowered first, because it changes nothing in what is learned; then
    the length, by which rows are lost; the rank last. The candidates of each come from large to small.
    """
    lengths = [length for share in (1, 2, 4, 8) if (length := tokens // share) >= SHORTEST_TOKENS] or [tokens]
    for rank in ranks:
        for length in lengths:
            for size in micro_batches:
                if predict(size, length, rank).total_bytes <= available:
                    return size, length, rank
    return None


def check_fits(
    predicted: Estimate, available_bytes: int, *, micro_batch_size: int, longest_tokens: int, remedy: str | None = None
) -> None:
    """Raises OutOfMemoryError with the remedy (None: a general one) when the estimate is more than there is."""
    if predicted.total_bytes <= available_bytes:
        return
    raise OutOfMemoryError(
        f"this run needs about {gib(predicted.total_bytes)} (base {gib(predicted.base_bytes)}, "
        f"adapter and optimizer {gib(predicted.adapter_bytes)}, activations {gib(predicted.activation_bytes)} "
        f"for {micro_batch_size} examples of up to {longest_tokens} tokens at once) "
        f"and {gib(available_bytes)} are available: " + (remedy or GENERAL_REMEDY)
    )


def available_bytes(device_type: str = "cpu") -> int:
    """Bytes that this process may take: of the GPU for "cuda", else of the machine or its cgroup, whichever is less."""
    if device_type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info()[0])
    own = psutil.Process().memory_info().rss  # the estimate counts what this process has loaded already
    return min(int(psutil.virtual_memory().available), cgroup_available()) + own


def peak_bytes(device_type: str = "cpu") -> int:
    """The most that this process has held so far: allocated on the GPU for "cuda", else resident in memory."""
    if device_type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def cgroup_available(root: Path = Path("/sys/fs/cgroup")) -> int:
    """What the container's limit leaves, for cgroup 2 and 1; a very large number without a limit."""
    for limit_file, usage_file in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            limit, usage = (root / limit_file).read_text().strip(), (root / usage_file).read_text().strip()
        except OSError:
            continue
        if limit.isdigit() and usage.isdigit():
            return max(0, int(limit) - int(usage))
    return 1 << 62


def killed_message(signal_name: str) -> str:
    """What to say of a child that a signal ended, SIGKILL being what the kernel sends when memory is short."""
    return (
        f"the training process was ended by {signal_name}: if nobody did that, the machine ran out of memory "
        "(see `dmesg`). Free memory and go on with --resume, or lower trainer.micro_batch_size or trainer.max_length "
        "and start a new run"
    )


def gib(size_bytes: int) -> str:
    return f"{size_bytes / GIB:.2f} GiB"
