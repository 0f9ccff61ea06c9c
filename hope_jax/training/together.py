"""What several processes that train one model have to agree on; nothing to do for one alone."""

import jax
import numpy as np
from jax.experimental import multihost_utils


def is_first() -> bool:
    """Whether this process writes what is written once: metrics, summaries, folders."""
    return jax.process_index() == 0


def wait(place: str):
    """Waits until all processes have come to this place."""
    multihost_utils.sync_global_devices(place)


def largest(*numbers: float) -> list[float]:
    """The largest of each number over all processes."""
    if jax.process_count() == 1:
        return list(numbers)
    return multihost_utils.process_allgather(np.array(numbers)).max(axis=0).tolist()


def all_of(fact: bool) -> bool:
    """Whether something is so in all processes."""
    return largest(float(not fact)) == [0.0]


def must_stop(step: int) -> bool:
    """Whether a process was told to end (SIGTERM): says so after the same step in all of them."""
    return jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step)


def lost(error: Exception) -> str | None:
    """Says that another process is gone, if that is what an error comes from."""
    network = isinstance(error, jax.errors.JaxRuntimeError) or "Gloo" in str(error)
    if jax.process_count() == 1 or not network:
        return None
    return f"another process is lost ({str(error).splitlines()[0]})"
