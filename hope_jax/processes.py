"""Joins the processes of one job, on one host or many, and ends them together."""

import os
import sys
from types import TracebackType
from typing import Any

import jax

HEARTBEAT = 20
"""Seconds without a sign of life after which a process counts as lost."""

HELP = (
    "train with several processes: auto asks the environment (Cloud TPU, GKE, SLURM, Open MPI), "
    "or HOST:PORT,COUNT,INDEX of process 0, of them all, and of this one (on a host with GPUs, say "
    "by JAX_LOCAL_DEVICE_IDS which are this one's)"
)


def join(how: str | None):
    """Meets the other processes of the job, before jax looks for devices.

    Args:
      how: See `HELP`; None for a process on its own.

    Raises:
      ValueError: The environment knows of no job, or the others do not come.
    """
    if how is None:
        return
    settings = {} if how == "auto" else _read(how)
    try:
        jax.distributed.initialize(**settings, heartbeat_timeout_seconds=HEARTBEAT)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"the processes of {how} cannot meet: {reason}") from error
    sys.excepthook = _end_at_once


def fail(error: BaseException, status: int):
    """Ends the process with a message; among several at once, for the others may not answer."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    if jax.distributed.is_initialized():
        os._exit(status)
    sys.exit(status)


def _end_at_once(kind: type[BaseException], error: BaseException, trace: TracebackType | None):
    """Else Python's way out waits for the other processes, and they for this one."""
    sys.__excepthook__(kind, error, trace)
    sys.stderr.flush()
    os._exit(1)


def _read(how: str) -> dict[str, Any]:
    address, *numbers = how.split(",")
    if len(numbers) != 2 or not all(number.isdigit() for number in numbers) or ":" not in address:
        raise ValueError(f"must be auto or HOST:PORT,COUNT,INDEX, got {how}")
    count, index = map(int, numbers)
    if index >= count:
        raise ValueError(f"INDEX must be below COUNT={count}, got {index}")
    return {"coordinator_address": address, "num_processes": count, "process_id": index}
