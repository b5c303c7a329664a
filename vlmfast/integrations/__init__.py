"""Adapters for other tools; each needs its own extra."""
