"""Where the answers come from that PPO learns on: the trainer itself, the live server, or an engine of its own."""
