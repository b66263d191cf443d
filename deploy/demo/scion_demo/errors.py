"""The demo's own errors. Each message names the value, what was expected and the remedy."""


class DemoError(Exception):
    """Base of every error that the demo raises on purpose."""


class ProfileError(DemoError, ValueError):
    """A profile cannot be found or does not say what a profile must say."""
