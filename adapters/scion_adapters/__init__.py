"""What exists and who serves it: settings, database, registry, artifacts, rollouts.

Knows nothing of HTTP, of vLLM or of torch. The plugin and the trainer meet through this package and never import each
other.
"""
