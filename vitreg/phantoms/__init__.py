"""Artifacts that are no high norms, planted with known truth: see each kind's module."""
