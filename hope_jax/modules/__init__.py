"""Flax modules: slow parameters around one call to an op."""
