"""Suites of tasks: models trained at several rates and seeds, or on classes that come in groups."""
