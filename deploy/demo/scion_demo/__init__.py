"""The embedded demo: a small world, a base model that knows it, and simulated users who rate what they are told."""
