"""Evaluates a run: python eval.py RUN TASK [key=value ...]."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Literal

import jax
from tqdm import tqdm

from hope_jax import config, runs, sharding
from hope_jax.evaluation import TASKS, report
from hope_jax.evaluation.subject import Task, TaskError
from hope_jax.training.checkpoint import CheckpointError, OtherModelError

ERRORS = config.ConfigError, CheckpointError, OtherModelError, TaskError


def main(path: str, name: str, *overrides: str):
    """Asks one task of one checkpoint, prints what it found and writes it into RUN/eval."""
    task, which = parse(name, overrides)
    run = runs.find(Path(path))
    with sharding.use(runs.mesh(run.experiment)):
        model, checkpoint = runs.load(run, which)
        track = partial(tqdm, desc=name, leave=False, delay=1, disable=None)
        results = task.run(runs.subject(run, model)._replace(track=track))
    if jax.process_index() == 0:
        about = {
            "task": name,
            "settings": asdict(task),
            "checkpoint": str(checkpoint),
            "step": int(checkpoint.name),
            "date": datetime.now(UTC).isoformat(timespec="microseconds"),
            "device": jax.devices()[0].device_kind,
            "devices": jax.device_count(),
        }
        file = report.write(run.folder / "eval", {**about, "results": results})
        print(f"{name} of {checkpoint}\n{report.table(results)}\nwritten to {file}")


def parse(name: str, overrides: Sequence[str]) -> tuple[Task, runs.Which]:
    """Reads the command line: what to ask, and of which checkpoint."""
    choice = Literal[tuple(TASKS)]  # pyrefly: ignore[invalid-literal]
    task = TASKS[config.parse(choice, name, "task")]
    mine = [override for override in overrides if override.startswith("checkpoint=")]
    rest = [override for override in overrides if override not in mine]
    return config.arguments(task, rest), config.arguments(runs.Choice, mine).checkpoint


def usage() -> str:
    """Lists the tasks with their settings."""
    lines = ["checkpoint=latest|best|STEP goes with every task; tasks and their settings:"]
    for name, task in TASKS.items():
        defaults = [(f.name, "" if f.default is None else f.default) for f in fields(task)]
        lines += [f"  {name}: {(task.__doc__ or '').splitlines()[0]}"]
        lines += ["    " + " ".join(f"{key}={default}" for key, default in defaults)]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=usage(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", metavar="RUN", help="a run folder, or a checkpoint in it")
    parser.add_argument("task", metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="settings of the task")
    given = parser.parse_args()
    try:
        main(given.run, given.task, *given.overrides)
    except ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
