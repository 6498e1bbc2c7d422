"""`python -m vitreg` is the `vitreg` command."""

from vitreg.cli import main

main()
