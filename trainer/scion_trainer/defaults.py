"""What the recipes use where the settings leave a value open: rules that hold from the demo's base to large models.

Pure functions of the base and the data. The measurements behind them are in docs/decisions/.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from scion_adapters.fingerprint import BaseInfo
from scion_trainer.config import RunConfig

KTO_RATE_TIMES_WIDTH = 0.38
DPO_RATE_TIMES_WIDTH = 0.38
SFT_RATE_TIMES_WIDTH = 0.8
REWARD_RATE_TIMES_WIDTH = 0.4
PPO_RATE_TIMES_WIDTH = 0.1
PPO_ANSWERS_SAMPLED = 1600
PPO_MAX_EPOCHS = 8.0
REWARD_EXAMPLES_SEEN = 2400
REWARD_MAX_EPOCHS = 4.0
KTO_EXAMPLES_SEEN = 2400
KTO_MAX_EPOCHS = 4.0
DPO_MAX_EPOCHS = 8.0
KTO_BETA_TIMES_TOKENS = 20.0
KTO_MAX_BETA = 1.0


def hidden_size(base: BaseInfo) -> int:
    """The width of the base: the input size that most of its linear layers have."""
    sizes = Counter(inner for _, inner in base.modules.values())
    return max(sizes, key=lambda size: (sizes[size], -size), default=1)


def learning_rate(recipe: str, width: int) -> float:
    """Peak rate of Adam on a base of hidden size `width`: for KTO 2e-3 at 192 and 9e-5 at 4096, for SFT 2e-4.

    Adam moves every weight by about the rate, so a layer's output moves by rate times width; keeping that product
    constant carries a rate from one width to another (Yang et al., 2022, arXiv 2203.03466, table 3).
    """
    products = {
        "kto": KTO_RATE_TIMES_WIDTH,
        "dpo": DPO_RATE_TIMES_WIDTH,
        "sft": SFT_RATE_TIMES_WIDTH,
        "distill": SFT_RATE_TIMES_WIDTH,
        "reward": REWARD_RATE_TIMES_WIDTH,
        "ppo": PPO_RATE_TIMES_WIDTH,
    }
    return products[recipe] / width


def kto_epochs(num_examples: int) -> float:
    """Four passes over few ratings, one over many: between them as many as see 2,400 examples.

    More passes over a first round of 400 cost accuracy and gain nothing; over three rounds together, two passes did as
    well as four.
    """
    return min(KTO_MAX_EPOCHS, max(1.0, KTO_EXAMPLES_SEEN / max(1, num_examples)))


def dpo_epochs(num_pairs: int) -> float:
    """As KTO's, and up to eight passes: pairs are few where they must be found among single thumbs.

    On 160 to 190 pairs of the demo, in four trials, four passes at half the rate reached 58 to 76% thumbs up, and eight
    80 to 89%, with accuracy at most 1.7 points lower.
    """
    return min(DPO_MAX_EPOCHS, max(1.0, KTO_EXAMPLES_SEEN / max(1, num_pairs)))


def reward_epochs(num_examples: int) -> float:
    """Passes of each member of a reward model: as many as see 2,400 examples, from one to four.

    On 1,060 examples of the demo, AUROC on unseen users was 0.98 after two passes (users who like rambling answers).
    """
    return min(REWARD_MAX_EPOCHS, max(1.0, REWARD_EXAMPLES_SEEN / max(1, num_examples)))


def ppo_epochs(num_prompts: int) -> float:
    """How often each prompt is answered: 1,600 answers in all, from one to eight of each."""
    return min(PPO_MAX_EPOCHS, max(1.0, PPO_ANSWERS_SAMPLED / max(1, num_prompts)))


def kto_beta(mean_answer_tokens: float) -> float:
    """KTO's beta for answers of that length: 0.1, the paper's value, for 200 tokens, and at most 1.

    The loss sees beta times a log-ratio that is summed over the answer. For short answers a beta of 0.1 hardly holds
    the model back: it cost 2 to 4 points of accuracy on answers of 15 tokens.
    """
    return min(KTO_MAX_BETA, KTO_BETA_TIMES_TOKENS / max(1.0, mean_answer_tokens))


def resolve(config: RunConfig, base: BaseInfo, *, num_examples: int, mean_answer_tokens: float) -> RunConfig:
    """`config` with nothing left open."""
    rate, options = config.learning_rate, dict(config.options)
    epochs = {"dpo": dpo_epochs, "reward": reward_epochs, "ppo": ppo_epochs}.get(config.recipe, kto_epochs)
    if "beta" in options and options["beta"] is None:
        options["beta"] = kto_beta(mean_answer_tokens)
    return replace(
        config,
        learning_rate=learning_rate(config.recipe, hidden_size(base)) if rate is None else rate,
        epochs=epochs(num_examples) if config.epochs is None else config.epochs,
        options=options,
    )
