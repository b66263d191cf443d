"""What the embedded base promises: small, made for NF4, and a chat template that trainers and servers can use."""

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from scion_demo.retention import build_retention, retention_path
from scion_demo.world import facts

BASE = Path(str(resources.files("scion_demo") / "base"))
CHAT = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris."},
    {"role": "user", "content": "How much is 2 plus 3?"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BASE)


def test_the_base_is_small_and_fits_the_blocks_of_nf4() -> None:
    config = json.loads((BASE / "config.json").read_text())
    assert (BASE / "model.safetensors").stat().st_size <= 6_000_000
    assert config["dtype"] == "bfloat16"
    attended = config["num_attention_heads"] * config["head_dim"]
    assert all(width % 64 == 0 for width in (config["hidden_size"], config["intermediate_size"], attended))


def test_the_template_ends_every_turn_and_only_appends(tokenizer: Any) -> None:
    asked = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert asked == (
        "<|system|>You are a helpful assistant.<|end|><|user|>What is the capital of France?<|end|>"
        "<|assistant|>Paris.<|end|><|user|>How much is 2 plus 3?<|end|><|assistant|>"
    )
    answered = tokenizer.apply_chat_template([*CHAT, {"role": "assistant", "content": "5."}], tokenize=False)
    assert answered == f"{asked}5.<|end|>"
    assert tokenizer.eos_token == "<|end|>"


def test_the_template_marks_what_the_assistant_says(tokenizer: Any) -> None:
    row = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    said = [token for token, spoken in zip(row["input_ids"], row["assistant_masks"], strict=True) if spoken]
    assert tokenizer.decode(said) == "Paris.<|end|>"


def test_every_role_marker_is_one_token(tokenizer: Any) -> None:
    assert all(
        len(tokenizer(f"<|{role}|>")["input_ids"]) == 1 for role in ("system", "user", "assistant", "end", "pad")
    )


def test_the_retention_file_is_what_its_function_builds() -> None:
    rows = [json.loads(line) for line in retention_path().read_text(encoding="utf-8").splitlines()]
    assert rows == build_retention()
    assert len(rows) == len(facts())


def test_retention_scores_the_fact_alone(tokenizer: Any) -> None:
    for row, fact in zip(build_retention(), facts(), strict=True):
        assert row["answer"] == f" {fact.answer}"
        assert fact.answer not in row["prefix"].split()
        assert row["prefix"].lower().endswith(f"{fact.subject.lower()} is")
        prefix, whole = tokenizer(row["prefix"])["input_ids"], tokenizer(row["prefix"] + row["answer"])["input_ids"]
        assert whole[: len(prefix)] == prefix  # so that the answer has tokens of its own
