"""The sections of the configuration: every field with its default and its description (settings.py has the whole)."""
