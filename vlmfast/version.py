"""The version of the package; `pyproject.toml` and the changelog hold the same."""

__version__ = "0.2.0"
