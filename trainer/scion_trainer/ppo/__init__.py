"""PPO on one quantized base: its mathematics, the log-probs and values it needs, and the algorithm as one story."""
