"""What the trainer needs: when it runs, on what, and each recipe's own settings."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from scion_adapters.sections.section import Section

RecipeName = Literal["auto", "sft", "kto", "dpo", "reward", "ppo", "distill"]


class LoraSection(Section):
    """Shape of the adapters that runs make."""

    rank: int = Field(16, ge=1, description="LoRA rank; at most server.max_lora_rank.")
    alpha: int = Field(32, ge=1, description="LoRA alpha; the update is scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the LoRA path while training.")


class KtoSection(Section):
    """KTO: thumbs up and down (Ethayarajh et al., 2024)."""

    learning_rate: float | None = Field(
        None, gt=0, description="Peak learning rate; unset = 0.38 / hidden size of the base: 9e-5 for an 8B."
    )
    epochs: float | None = Field(
        None, gt=0, description="Passes over the snapshot; unset = 2400 / examples, at least 1 and at most 4."
    )
    beta: float | None = Field(
        None, gt=0, description="Pull towards the parent; unset = 20 / mean answer tokens, at most 1."
    )
    likelihood_weight: float = Field(
        5.0, ge=0, description="Weight, times beta, of liked answers' likelihood beside KTO's loss: it keeps facts."
    )
    batch_size: int = Field(16, ge=2, description="Examples per optimizer step.")


class SftSection(Section):
    """SFT: corrections and liked answers."""

    learning_rate: float | None = Field(
        None, gt=0, description="Peak learning rate; unset = 0.8 / hidden size of the base: 2e-4 for an 8B."
    )
    epochs: float = Field(3.0, gt=0, description="Passes over the snapshot.")
    batch_size: int = Field(16, ge=1, description="Examples per optimizer step.")


class DpoSection(Section):
    """DPO: pairs of which one answer is preferred to the other (Rafailov et al., 2023)."""

    learning_rate: float | None = Field(
        None, gt=0, description="Peak learning rate; unset = 0.38 / hidden size of the base: 9e-5 for an 8B."
    )
    epochs: float | None = Field(
        None, gt=0, description="Passes over the pairs; unset = 2400 / pairs, at least 1 and at most 8."
    )
    beta: float | None = Field(
        None, gt=0, description="Pull towards the parent; unset = 20 / mean answer tokens, at most 1."
    )
    likelihood_weight: float = Field(
        1.0, ge=0, description="Weight, times beta, of preferred answers' likelihood beside DPO's loss: it keeps facts."
    )
    batch_size: int = Field(16, ge=2, description="Pairs per optimizer step.")


class RewardSection(Section):
    """The reward model: LoRA members with a scalar head on the base, and the gate that it must pass before PPO."""

    learning_rate: float | None = Field(
        None, gt=0, description="Peak learning rate; unset = 0.4 / hidden size of the base: 1e-4 for an 8B."
    )
    epochs: float | None = Field(
        None, gt=0, description="Passes of each member over its ratings; unset = 2400 / examples, from 1 to 4."
    )
    batch_size: int = Field(16, ge=2, description="Thumbs and pairs per optimizer step.")
    members: int = Field(
        3, ge=1, le=9, description="LoRAs trained one after the other, each on its own draw of the raters."
    )
    disagreement_penalty: float = Field(
        1.0, ge=0, description="Standard deviations over the members that are taken off their mean score."
    )
    rater_bias_std: float = Field(
        1.0, gt=0, description="How much raters are expected to differ in liking anything at all, in log-odds."
    )
    min_auroc: float = Field(
        0.6, ge=0.5, lt=1, description="Its gate: AUROC (accuracy on pairs) on unseen users, at the interval's low end."
    )
    max_calibration_error: float = Field(
        0.15, gt=0, le=1, description="Its gate: how far its calibrated probabilities may be off, on average."
    )
    max_length_correlation: float = Field(
        0.6, gt=0, le=1, description="Its gate: how far scores may rise with length (rank correlation)."
    )


class PpoSection(Section):
    """PPO: the model answers its users' prompts, and learns from what the reward model says of it."""

    learning_rate: float | None = Field(
        None, gt=0, description="Peak learning rate; unset = 0.1 / hidden size of the base: 2.4e-5 for an 8B."
    )
    epochs: float | None = Field(
        None, gt=0, description="How often each prompt is answered; unset = 1600 / prompts, at least 1 and at most 8."
    )
    batch_size: int = Field(64, ge=2, description="Answers sampled before each round of learning.")
    max_tokens: int = Field(128, ge=1, description="Longest answer in tokens.")
    temperature: float = Field(1.0, gt=0, description="Temperature of the answers, and of the policy that learns.")
    passes: int = Field(4, ge=1, description="Passes over the answers of a round.")
    minibatches: int = Field(4, ge=1, description="Updates in each pass.")
    clip: float = Field(0.2, gt=0, lt=1, description="How far an update may move a token's probability ratio from 1.")
    kl_coefficient: float = Field(
        0.05, ge=0, description="Penalty at the start, in standard deviations of the reward per nat from the parent."
    )
    kl_target: float = Field(6.0, gt=0, description="Nats per answer from the parent that the penalty is adapted to.")
    rollouts: Literal["auto", "server", "engine", "local"] = Field(
        "auto",
        description="Who samples: the live server at low priority (server.ppo_rollouts), a vLLM of the run's own, or "
        "the trainer itself; auto takes the first of them that is there and worth its start.",
    )
    server_concurrency: int = Field(
        16, ge=1, description="Answers sampled at once from the live server, in the steps that its users leave free."
    )
    missing_eos_penalty: float = Field(
        1.0, ge=0, description="Standard deviations of the reward taken off an answer that was cut off at max_tokens."
    )


class DistillSection(Section):
    """Distillation: a teacher answers the prompts whose answers users disliked, and sft learns what it says."""

    teacher_url: str | None = Field(
        None, description="OpenAI-compatible endpoint that users' prompts are sent to, e.g. http://127.0.0.1:9000/v1."
    )
    teacher_model: str = Field("", description="The model's name there: a larger one, or another adapter.")
    api_key_env: str = Field("SCION_TEACHER_API_KEY", description="Environment variable with the key for it, if any.")
    max_prompts: int = Field(500, ge=1, description="Prompts asked in one run, the newest dislikes first.")
    max_tokens: int = Field(512, ge=1, description="Longest answer in tokens; those cut off are not learned from.")
    temperature: float = Field(0.7, ge=0, description="Temperature of the teacher's answers.")
    concurrency: int = Field(8, ge=1, description="Requests at once.")
    min_answers: int = Field(20, ge=1, description="A run is refused when fewer answers pass the filter.")
    learning_rate: float | None = Field(
        None, gt=0, description="Peak learning rate; unset = 0.8 / hidden size of the base: 2e-4 for an 8B."
    )
    epochs: float = Field(3.0, gt=0, description="Passes over the teacher's answers.")
    batch_size: int = Field(16, ge=1, description="Examples per optimizer step.")


class AutoSection(Section):
    """The recipe `auto`: corrections and likes go to sft, thumbs to kto, pairs to dpo, many ratings to ppo."""

    min_pairs: int = Field(
        40, ge=1, description="Pairs (answers to one prompt, judged apart) from which on dpo is chosen."
    )
    ppo_min_ratings: int = Field(
        500, ge=1, description="Ratings from which on ppo is chosen, once a reward model has passed its gate."
    )


class TrainerSection(Section):
    """When and how `scion trainer` and `scion train` make versions."""

    server_url: str = Field("http://127.0.0.1:8000", description="The server that gates ask.")
    api_key: str | None = Field(None, description="Its API key (better set as SCION_TRAINER__API_KEY).")
    schedule: str | None = Field(None, description='Cron expression, e.g. "0 3 * * *"; unset = no fixed times.')
    min_new_ratings: int | None = Field(
        None, ge=1, description="Start a run after this many new ratings; unset = never by count."
    )
    check_interval_s: float = Field(60.0, gt=0, description="How often the daemon counts new ratings.")
    recipe: RecipeName = Field("kto", description="Recipe of scheduled runs; auto chooses by the ratings.")
    rollout: bool = Field(True, description="Start a rollout when a scheduled run's candidate passed the gates.")
    min_ratings: int = Field(40, ge=2, description="A run with fewer usable ratings is refused.")
    heldout_share: float = Field(0.15, gt=0, lt=0.5, description="Share of users whose ratings are kept for the gates.")
    newest_share: float = Field(
        0.05, ge=0, lt=0.5, description="Share of ratings, the newest, that are kept for the gates as well."
    )
    kl_budget: float = Field(
        4.0,
        gt=0,
        description="Nats per token from the base, measured on held-out prompts, beyond which nothing is published.",
    )
    replay_share: float = Field(
        0.2,
        ge=0,
        lt=1,
        description="Share of a run's ratings that are drawn from earlier snapshots, where max_age_days or --since "
        "leaves those out.",
    )
    max_age_days: float | None = Field(None, gt=0, description="Leave older ratings out; unset = use all.")
    red_team_share: float = Field(
        0.1, ge=0, lt=1, description="Largest share of a snapshot that findings of the red team may have; 0 = none."
    )
    max_length: int = Field(
        1024, ge=16, description="Longest prompt plus answer in tokens; longer rows are dropped and counted."
    )
    checkpoint_every_steps: int = Field(
        20, ge=1, description="Optimizer steps between checkpoints: what a kill can lose."
    )
    micro_batch_size: int | None = Field(
        None, ge=1, description="Examples in memory at once; unset = the recipe's batch_size."
    )
    threads: int | None = Field(
        None, ge=1, description="CPU threads of a run; unset = all. Server and trainer share the cores."
    )
    cores: str | None = Field(
        None, description='CPU cores of a run and of the trainer\'s commands, e.g. "2-3" (Linux); unset = any.'
    )
    seed: int = Field(0, ge=0, description="Seed of runs.")
    report_to: str = Field("none", description="Where transformers reports metrics: none, tensorboard, wandb…")
    lora: LoraSection = Field(default_factory=LoraSection)
    kto: KtoSection = Field(default_factory=KtoSection)
    sft: SftSection = Field(default_factory=SftSection)
    dpo: DpoSection = Field(default_factory=DpoSection)
    reward: RewardSection = Field(default_factory=RewardSection)
    ppo: PpoSection = Field(default_factory=PpoSection)
    distill: DistillSection = Field(default_factory=DistillSection)
    auto: AutoSection = Field(default_factory=AutoSection)


class AdapterSection(Section):
    """One line of versions. Fields that are set override [trainer] for this adapter."""

    schedule: str | None = Field(None, description="Cron expression for this adapter.")
    min_new_ratings: int | None = Field(None, ge=1, description="New ratings that start a run of this adapter.")
    recipe: RecipeName | None = Field(None, description="Recipe of this adapter's scheduled runs.")
