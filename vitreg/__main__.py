"""`python -m vitreg` is the `vitreg` command."""

from vitreg.cli.main import main

main()
