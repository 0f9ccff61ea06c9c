"""Suites of made-up tasks: several models, each trained on each task at several rates and seeds."""
