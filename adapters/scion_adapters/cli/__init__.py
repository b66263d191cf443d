"""The `scion` command: its root, its output, and the commands about adapters, rollouts, database and configuration."""
