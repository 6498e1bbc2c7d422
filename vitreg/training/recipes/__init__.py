"""The recipes that come with vitreg, one a file: `vitreg train NAME`."""
