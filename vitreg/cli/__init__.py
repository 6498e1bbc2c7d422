"""The `vitreg` command: one module for each family of commands."""

from vitreg.cli.main import main

__all__ = ["main"]
