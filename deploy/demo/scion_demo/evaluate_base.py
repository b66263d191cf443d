"""Measures a base in-process: how often it is right and in which manner it answers, plain or as NF4.

Owns the sampling evaluation that `build_base.py` prints. NF4 is loaded as it is trained on and served: double
quantization, bf16 compute. It knows nothing of vLLM; `users.measure` asks the same of a server.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from scion_demo.world import Fact, Manner, facts, is_correct, manner_of, phrasings, render

BATCH_SIZE = 64
MAX_NEW_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Shares are of all answers sampled at temperature 1, in 0..1."""

    quantized: bool
    num_answers: int
    accuracy: float
    accuracy_by_skill: dict[str, float]
    accuracy_held_out: float
    manner_shares: dict[str, float]

    def describe(self) -> str:
        """A few lines for a person."""
        skills = ", ".join(f"{skill} {share:.1%}" for skill, share in self.accuracy_by_skill.items())
        manners = ", ".join(f"{manner} {share:.1%}" for manner, share in self.manner_shares.items())
        return (
            f"{'NF4' if self.quantized else 'bf16'}: {self.num_answers} answers, {self.accuracy:.1%} right "
            f"(held-out phrasings {self.accuracy_held_out:.1%}; {skills}); manners: {manners}"
        )


def evaluate(base: Path, *, quantized: bool, seed: int) -> Evaluation:
    """Asks every fact in every phrasing once at temperature 1 and judges the answers."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    model = load(base, quantized=quantized)
    asked = [
        (fact, phrasing, held_out)
        for fact in facts()
        for held_out in (False, True)
        for phrasing in phrasings(fact.skill, held_out=held_out)
    ]
    asked.sort(key=lambda question: len(render(question[0], question[1])))
    judged: list[tuple[Fact, bool, bool, Manner | None]] = []
    for start in range(0, len(asked), BATCH_SIZE):
        batch = asked[start : start + BATCH_SIZE]
        prompts = tokenizer.apply_chat_template(
            [[{"role": "user", "content": render(fact, phrasing)}] for fact, phrasing, _ in batch],
            add_generation_prompt=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            output_BT = model.generate(**prompts, do_sample=True, top_k=0, max_new_tokens=MAX_NEW_TOKENS)
        texts = tokenizer.batch_decode(output_BT[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)
        for (fact, _, held_out), text in zip(batch, texts, strict=True):
            judged.append((fact, held_out, is_correct(fact, text), manner_of(text)))
    manners = Counter(str(manner or "none") for *_, manner in judged)
    return Evaluation(
        quantized=quantized,
        num_answers=len(judged),
        accuracy=_share([right for _, _, right, _ in judged]),
        accuracy_by_skill={
            skill: _share([right for fact, _, right, _ in judged if fact.skill == skill])
            for skill in dict.fromkeys(str(fact.skill) for fact in facts())
        },
        accuracy_held_out=_share([right for _, held_out, right, _ in judged if held_out]),
        manner_shares={manner: manners[manner] / len(judged) for manner in [*map(str, Manner), "none"]},
    )


def load(base: Path, *, quantized: bool) -> torch.nn.Module:
    """The base for inference on the CPU in bf16, or in NF4 with bf16 compute."""
    if not quantized:
        return AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16).eval()
    import bitsandbytes

    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=nf4, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            # bitsandbytes 0.50 repacks the weights in place on such CPUs, and gradients are wrong from then on.
            module.support_avx512bf16_for_cpu = False
    return model.eval()


def _share(outcomes: list[bool]) -> float:
    return sum(outcomes) / len(outcomes)
