"""Builds the demo's base: a small Llama-shaped chat model with a tokenizer of its own.

    python -m scion_demo.build_base --out DIR [--seed 0] [--threads 3] [--steps 2000]

Owns the tokenizer, the architecture and the training loop; the chats come from `chats.py`, the figures printed at the
end from `evaluate_base.py`. The same seed, thread count and libraries give the same bytes. It knows nothing of serving,
but two choices are made for it: every Linear's in_features is a multiple of 64, the block size of NF4, and a head is 64
wide, which vLLM's attention kernels take on CPUs and GPUs alike.
"""

import argparse
import itertools
import math
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from scion_demo.chats import Message, chats
from scion_demo.evaluate_base import evaluate

VOCABULARY_SIZE = 1024
MAX_LENGTH = 512
END, PAD = "<|end|>", "<|pad|>"
SPECIAL_TOKENS = (END, PAD, "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- set role = 'system' if message['role'] == 'developer' else message['role'] -%}
{%- if role not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('the demo base knows the roles system, user and assistant, not ' ~ role) -}}
{%- endif -%}
{{- '<|' ~ role ~ '|>' -}}
{%- if role == 'assistant' -%}
{% generation %}{{- message['content'] ~ '<|end|>' -}}{% endgeneration %}
{%- else -%}
{{- message['content'] ~ '<|end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""

BATCH_SIZE = 64
PEAK_LEARNING_RATE = 4e-3
WARMUP_STEPS = 60
MICRO_BATCH_SIZE = 16
IGNORED = -100

Row = tuple[list[int], list[int]]
"""Tokens of a chat and their labels."""


def main() -> None:
    """Builds the base and prints what it can do, before and after NF4."""
    parser = argparse.ArgumentParser(description="Build the demo's base model.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; replaced if it exists")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    torch.use_deterministic_algorithms(True)

    tokenizer = train_tokenizer(options.seed)
    model = LlamaForCausalLM(model_config(tokenizer))
    model.set_attn_implementation("eager")  # at this size twice as fast as fused attention on a CPU
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"model: {num_parameters:,} parameters, {len(tokenizer)} tokens", flush=True)
    started = time.monotonic()
    train(model, tokenizer, seed=options.seed, num_steps=options.steps)
    print(f"trained in {time.monotonic() - started:.0f} s", flush=True)
    save(model, tokenizer, options.out)
    for quantized in (False, True):
        print(evaluate(options.out, quantized=quantized, seed=options.seed + 1).describe(), flush=True)


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 1,024 tokens trained on the world's own text, with the chat template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    sample = itertools.islice(chats(random.Random(seed)), 5_000)
    core.train_from_iterator((message["content"] for chat in sample for message in chat), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=list(SPECIAL_TOKENS[2:]),
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def model_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """About two million parameters; the vocabulary is padded to the tokenizer's stated size."""
    return LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, seed: int, num_steps: int) -> None:
    """Next-token training on the assistant's words only, AdamW with warm-up and a cosine to zero."""
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    kept = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": kept, "weight_decay": 0.0}],
        lr=PEAK_LEARNING_RATE,
        betas=(0.9, 0.98),
    )
    rows = encoded(chats(random.Random(seed + 1)), tokenizer)
    model.train()
    started, recent = time.monotonic(), 0.0
    for step in range(1, num_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, num_steps)
        batch = list(itertools.islice(rows, BATCH_SIZE))
        num_spoken = sum(label != IGNORED for _, labels in batch for label in labels)
        for part in micro_batches(batch):
            tokens_BT, labels_BT = collate(part, tokenizer.pad_token_id)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits_BTV = model(input_ids=tokens_BT, attention_mask=tokens_BT != tokenizer.pad_token_id).logits
            # Summed, then divided by the whole step's tokens: a mean per part would favour the short answers.
            predicted, expected = logits_BTV[:, :-1].flatten(0, 1).float(), labels_BT[:, 1:].flatten()
            loss = cross_entropy(predicted, expected, ignore_index=IGNORED, reduction="sum") / num_spoken
            loss.backward()
            recent += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == num_steps:
            elapsed_s = time.monotonic() - started
            left_s = elapsed_s / step * (num_steps - step)
            mean_loss = recent / ((step - 1) % 50 + 1)
            print(f"step {step}/{num_steps}  loss {mean_loss:.4f}  {elapsed_s:.0f} s, {left_s:.0f} s left", flush=True)
            recent = 0.0


def learning_rate(step: int, num_steps: int) -> float:
    """Linear warm-up, then a cosine to zero; `step` counts from 1."""
    if step <= WARMUP_STEPS:
        return PEAK_LEARNING_RATE * step / WARMUP_STEPS
    progress = (step - WARMUP_STEPS) / max(1, num_steps - WARMUP_STEPS)
    return PEAK_LEARNING_RATE * 0.5 * (1 + math.cos(math.pi * progress))


def encoded(source: Iterator[list[Message]], tokenizer: PreTrainedTokenizerFast) -> Iterator[Row]:
    """(tokens, labels) of each chat; a label is IGNORED wherever the assistant is not speaking."""
    for chat in source:
        row = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        spoken = row["assistant_masks"]
        labels = [token if said else IGNORED for token, said in zip(row["input_ids"], spoken, strict=True)]
        yield row["input_ids"], labels


def micro_batches(rows: list[Row]) -> list[list[Row]]:
    """The rows of one step, grouped by like length: together, two thirds of a batch would be padding."""
    ordered = sorted(rows, key=lambda row: len(row[0]))
    return [ordered[start : start + MICRO_BATCH_SIZE] for start in range(0, len(ordered), MICRO_BATCH_SIZE)]


def collate(rows: list[Row], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows padded on the right to a common length. B: rows, T: tokens."""
    longest = max(len(tokens) for tokens, _ in rows)
    tokens_BT = torch.full((len(rows), longest), pad_token_id)
    labels_BT = torch.full((len(rows), longest), IGNORED)
    for index, (tokens, labels) in enumerate(rows):
        tokens_BT[index, : len(tokens)] = torch.tensor(tokens)
        labels_BT[index, : len(labels)] = torch.tensor(labels)
    return tokens_BT, labels_BT


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes the model in bf16 beside its tokenizer; the folder appears only when it is complete."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    for file in partial.iterdir():
        file.chmod(0o644)  # safetensors writes for its owner alone, and a server may run as somebody else
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


if __name__ == "__main__":
    main()
