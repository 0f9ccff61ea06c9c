"""Records of what benchmarks measure, see `hope_jax.records`."""

from hope_jax.records import append, record

__all__ = ["append", "record"]
