"""Doors into other tools; each needs its own extra."""
