"""Measured comparisons: `python -m tests.bench` runs them all, `python -m tests.bench NAME` one (or `make bench`)."""
