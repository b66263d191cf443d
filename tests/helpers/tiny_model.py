"""A chat model of a few thousand random weights with a tokenizer and a chat template, made in a second.

For tests that need the real libraries and no skill. Every Linear's input is a multiple of 64, the block size of NF4.
"""

from __future__ import annotations

from pathlib import Path

CHAT_TEMPLATE = (
    "{%- for m in messages -%}"
    "{%- if m['role'] not in ['system', 'user', 'assistant'] -%}{{- raise_exception('unknown role') -}}{%- endif -%}"
    "{{- '<|' ~ m['role'] ~ '|>' ~ m['content'] ~ '<|end|>' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


ARCHITECTURES: dict[str, dict[str, object]] = {
    "llama": {},
    "qwen3": {"head_dim": 32},
    "mistral": {"head_dim": 32, "sliding_window": 64},
    "gemma2": {"head_dim": 32, "sliding_window": 64, "query_pre_attn_scalar": 32},  # caps its logits
    "gemma3_text": {"head_dim": 32, "sliding_window": 64, "query_pre_attn_scalar": 32},
    "qwen3_moe": {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
}
"""transformers' model types, with what their configurations need beside the sizes that all share."""


def build_tiny_model(
    directory: Path, *, seed: int = 0, num_layers: int = 2, hidden: int = 64, architecture: str = "llama"
) -> Path:
    """Write a random model of an architecture in ARCHITECTURES (byte-level tokenizer) to `directory` and return it."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    special = ["<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*special, *alphabet])}, merges=[]))
    core.add_special_tokens(special)
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=256,
    )
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        architecture,
        vocab_size=320,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **ARCHITECTURES[architecture],
    )
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
