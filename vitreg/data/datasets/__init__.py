"""Data sets in their standard layouts -> lists of paths and annotations, checked before any work is done."""
