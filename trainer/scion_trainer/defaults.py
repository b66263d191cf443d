"""What the recipes use where the settings leave a value open: rules that hold from the demo's base to large models.

Pure functions of the base and the data. The measurements behind them are in docs/decisions/.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from scion_adapters.fingerprint import BaseInfo
from scion_trainer.config import RunConfig

KTO_RATE_TIMES_WIDTH = 0.19
SFT_RATE_TIMES_WIDTH = 0.8
KTO_EXAMPLES_SEEN = 2400
KTO_MAX_EPOCHS = 4.0
KTO_BETA_TIMES_TOKENS = 20.0
KTO_MAX_BETA = 1.0


def hidden_size(base: BaseInfo) -> int:
    """The width of the base: the input size that most of its linear layers have."""
    sizes = Counter(inner for _, inner in base.modules.values())
    return max(sizes, key=lambda size: (sizes[size], -size), default=1)


def learning_rate(recipe: str, width: int) -> float:
    """Peak rate of Adam on a base of hidden size `width`: for KTO 1e-3 at 192 and 4.6e-5 at 4096, for SFT 2e-4 at 4096.

    Adam moves every weight by about the rate, so a layer's output moves by rate times width; keeping that product
    constant carries a rate from one width to another (Yang et al., 2022, arXiv 2203.03466, table 3).
    """
    return (SFT_RATE_TIMES_WIDTH if recipe == "sft" else KTO_RATE_TIMES_WIDTH) / width


def kto_epochs(num_examples: int) -> float:
    """Four passes over few ratings, one over many: between them as many as see 2,400 examples.

    More passes over a first round of 400 cost accuracy and gain nothing; over three rounds together, two passes did as
    well as four.
    """
    return min(KTO_MAX_EPOCHS, max(1.0, KTO_EXAMPLES_SEEN / max(1, num_examples)))


def kto_beta(mean_answer_tokens: float) -> float:
    """KTO's beta for answers of that length: 0.1, the paper's value, for 200 tokens, and at most 1.

    The loss sees beta times a log-ratio that is summed over the answer. For short answers a beta of 0.1 hardly holds
    the model back: it cost 2 to 4 points of accuracy on answers of 15 tokens.
    """
    return min(KTO_MAX_BETA, KTO_BETA_TIMES_TOKENS / max(1.0, mean_answer_tokens))


def resolve(config: RunConfig, base: BaseInfo, *, num_examples: int, mean_answer_tokens: float) -> RunConfig:
    """`config` with nothing left open."""
    rate = config.learning_rate
    return replace(
        config,
        learning_rate=learning_rate(config.recipe, hidden_size(base)) if rate is None else rate,
        epochs=kto_epochs(num_examples) if config.epochs is None else config.epochs,
        beta=kto_beta(mean_answer_tokens) if config.beta is None else config.beta,
    )
