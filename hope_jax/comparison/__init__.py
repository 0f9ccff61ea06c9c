"""Optimizers on equal terms: the same tasks, learning rates, seeds and steps for each of them."""
