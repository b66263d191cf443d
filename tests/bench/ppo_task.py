"""The task that both PPO trainers get: a random Llama, prompts of random tokens, and a reward that can be climbed.

Also what a side writes down. Imported in both environments, so it needs nothing but torch and transformers.
`python -m tests.bench.ppo_task DIRECTORY JSON` makes the model; the JSON is its shape.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PAD = 0
LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA_RANK = 16


@dataclass(frozen=True, slots=True)
class Shape:
    """Of the model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocab: int
    deviation: float = 0.02
    """Of the random weights."""
    key_value_heads: int | None = None
    """None: as many as heads."""


LARGE = Shape(hidden=768, intermediate=3072, layers=13, heads=12, vocab=32_000)
"""172M weights."""
SMALL = Shape(hidden=64, intermediate=128, layers=2, heads=2, vocab=512, deviation=0.2)
"""With weights of 0.02 its logits would be so small that no hidden state gives a lower-half token more than 53%."""


@dataclass(frozen=True, slots=True)
class Task:
    """What both sides do `num_updates` times: answer `batch_size` prompts, then learn from the answers."""

    model: str  # directory
    batch_size: int
    num_updates: int
    at_once: int = 8  # answers in memory at once while learning
    prompt_tokens: int = 64
    response_tokens: int = 64
    passes: int = 4
    learning_rate: float = 3e-4
    threads: int = 4
    seed: int = 0


@dataclass(slots=True)
class Record:
    """What one side did: seconds and mean reward of each update."""

    seconds: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    setup_s: float = 0.0
    training_s: float = 0.0
    """From the beginning of the trainer's construction to the end of the training; 0: not measured."""
    note: str = ""
    device_peak_bytes: int = 0
    predicted_bytes: int = 0
    """The most memory of the GPU, without one of the process, and what was predicted; 0: nobody asked."""

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")


def read_arguments(argv: Sequence[str]) -> tuple[Task, Path, dict[str, Any]]:
    """`JSON OUTPUT`: the task with further keys beside it, and where the record goes."""
    data = json.loads(argv[1])
    return Task(**data.pop("task")), Path(argv[2]), data


def reward_of(response: Sequence[int], vocab: int) -> float:
    """The share of tokens from the lower half of the vocabulary: 0.5 for a random model, 1 at best."""
    return sum(token < vocab // 2 for token in response) / len(response)


def prompts(task: Task, vocab: int, count: int) -> list[list[int]]:
    """Random token ids, never the padding."""
    import torch

    generator = torch.Generator().manual_seed(task.seed)
    drawn = torch.randint(1, vocab, (count, task.prompt_tokens), generator=generator)
    ids: list[list[int]] = drawn.tolist()
    return ids


def build_model(directory: Path, shape: Shape) -> Path:
    """The directory with a random Llama in bf16 and a tokenizer of one token per word; made once.

    In a process of its own, which takes with it what it held of the GPU: the sides are to find all of that.
    """
    if not (directory / "tokenizer_config.json").is_file():
        command = [sys.executable, "-m", "tests.bench.ppo_task", str(directory.resolve()), json.dumps(asdict(shape))]
        subprocess.run(command, cwd=Path(__file__).parents[2], check=True)
    return directory


def make_model(directory: Path, shape: Shape) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads or shape.heads,
        max_position_embeddings=512,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=1,
        initializer_range=shape.deviation,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"  # billions of random numbers take the CPU minutes
    with torch.device(device):
        LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    core = Tokenizer(
        models.WordLevel({"<pad>": PAD, "<eos>": 1} | {f"w{i}": i for i in range(2, shape.vocab)}, "<eos>")
    )
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        chat_template="{% for m in messages %}{{ m['content'] }} {% endfor %}",
    )
    tokenizer.save_pretrained(directory)


def device_peak_bytes() -> int:
    """The most that this process has held so far: on the GPU where there is one, else in memory."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Watch:
    """Seconds between calls."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def lap(self) -> float:
        now = time.monotonic()
        self._last, seconds = now, now - self._last
        return seconds


if __name__ == "__main__":
    make_model(Path(sys.argv[1]), Shape(**json.loads(sys.argv[2])))
