"""md2's version: the one place that states it. `pyproject.toml` reads it from here, `md2` exports it."""

__version__ = "0.1.0"
