"""The reward model: how much users would like an answer, learned from thumbs and pairs, and judged on unseen users."""
