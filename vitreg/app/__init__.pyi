from .launching import example_explorer, explorer_of, launch, serve

__all__ = [
    "example_explorer",
    "explorer_of",
    "launch",
    "serve",
]
