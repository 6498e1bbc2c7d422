"""The `vitreg` command: one module for each family of commands, main.py joins them."""
