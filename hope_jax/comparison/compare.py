"""The command `compare`: runs what a config compares, cell by cell, and goes on where it was."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from hope_jax import config, sharding
from hope_jax.comparison import cells as cell_files
from hope_jax.comparison import report
from hope_jax.comparison.digits import DigitsTask
from hope_jax.comparison.language import LanguageTask
from hope_jax.comparison.problem import Problem
from hope_jax.comparison.replicas import Programs, Replica, speed, train
from hope_jax.comparison.toys import SequenceTask, ValleyTask
from hope_jax.optimizers import OptimizerConfig, Rule, ScheduleConfig

AnyTask = ValleyTask | SequenceTask | DigitsTask | LanguageTask


@dataclass(frozen=True, kw_only=True)
class Contender:
    """An optimizer that takes part.

    Attributes:
      rule: The optimizer, one of `hope_jax.optimizers.OPTIMIZERS`.
      name: In files and tables; None for the rule's kind.
      scale: Its learning rates are those of the comparison times this: as many for all optimizers,
        in a range that suits each.
    """

    rule: Rule
    name: str | None = None
    scale: float = 1.0

    def __post_init__(self):
        if not self.scale > 0:
            raise ValueError(f"scale must be above 0, got {self.scale}")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Optimizers x tasks x learning rates x seeds.

    Every optimizer has the same budget: all rates and seeds on every task. Of its rates the one
    with the least validation loss counts (mean over the seeds; or the one that reaches the task's
    goal in the fewest steps), and of that the mean over the seeds and their spread are reported.

    Attributes:
      tasks: What is learned.
      optimizers: What is compared. Overheads are against the first of them.
      rates: Learning rates that are tried.
      seeds: Where parameters start; batches are the same for all runs of a task.
      schedule: Of the learning rate.
      weight_decay: Times the learning rate; on matrices alone.
      clip: Gradients of a larger global norm are scaled down to it; None leaves them.
      folder: Where comparisons lie; this one lies in the folder of its name there.
      name: Of the comparison and of its folder; the config file's by default.
    """

    tasks: tuple[AnyTask, ...]
    optimizers: tuple[Contender, ...]
    rates: tuple[float, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    weight_decay: float = 0.0
    clip: float | None = 1.0
    folder: str = "runs"
    name: str = "compare"

    def __post_init__(self):
        named = {"tasks": [*map(_name, self.tasks)], "optimizers": [*map(_name, self.optimizers)]}
        cell_files.check({**named, "rates": self.rates, "seeds": self.seeds}, self.name)
        self.optimizer(self.optimizers[0])

    def optimizer(self, contender: Contender) -> OptimizerConfig:
        """The whole optimizer around a contender's rule."""
        return OptimizerConfig(
            rule=contender.rule,
            schedule=self.schedule,
            weight_decay=self.weight_decay,
            clip=self.clip,
        )


class Cell(NamedTuple):
    """One run of a comparison, and the file of what it found.

    Attributes:
      task: What is learned.
      contender: By which optimizer.
      replica: At which rate, from which seed.
      path: Named after all settings that the run depends on.
    """

    task: AnyTask
    contender: Contender
    replica: Replica
    path: Path


def run(comparison: Comparison) -> Path:
    """Runs every cell that has not been, and writes the report.

    A cell's result is a JSON file in the folder of the comparison; a cell that has one with the
    same settings is never run again. An optimizer's cells are written when all of its missing ones
    of a task are done.

    Args:
      comparison: What to compare.

    Returns:
      The folder, with report.html, a picture of each task, records.json and the cells.

    Raises:
      ConfigError: A task cannot be built, as when its data is missing.
    """
    folder = Path(comparison.folder) / comparison.name
    missing = [cell for cell in cells(comparison, folder) if not cell.path.exists()]
    pairs = list(dict.fromkeys((cell.task, cell.contender) for cell in missing))
    with sharding.use(sharding.MeshConfig().build(jax.devices()[:1])):
        for number, pair in enumerate(pairs, 1):
            mine = [cell for cell in missing if (cell.task, cell.contender) == pair]
            _run_cells(comparison, *pair, mine, f"{number}/{len(pairs)}")
    results = {
        (_name(cell.task), _name(cell.contender), cell.replica): cell_files.read(cell.path)
        for cell in cells(comparison, folder)
    }
    goals = {_name(task): task.goal for task in comparison.tasks}
    report.write(folder, comparison.name, results, goals)
    return folder


def cells(comparison: Comparison, folder: Path) -> Iterator[Cell]:
    """All runs of a comparison."""
    for task in comparison.tasks:
        identity = task.identity()
        for contender in comparison.optimizers:
            optimizer = asdict(replace(comparison.optimizer(contender), learning_rate=0.0))
            for rate in comparison.rates:
                for seed in comparison.seeds:
                    replica = Replica(float(f"{rate * contender.scale:.6g}"), seed)
                    settings = [identity, optimizer, replica]
                    place = folder / "cells" / _name(task) / _name(contender)
                    path = cell_files.path(place, f"{replica.rate:g}-{seed}", settings)
                    yield Cell(task, contender, replica, path)


def load(path: str, overrides: Sequence[str] = ()) -> Comparison:
    """Reads a config, see `hope_jax.config.load`."""
    return config.read(Comparison, path, overrides)


def _run_cells(
    comparison: Comparison, task: AnyTask, contender: Contender, cells: list[Cell], label: str
):
    """Trains an optimizer's missing runs of a task together and writes what they found."""
    problem, programs = _prepare(task)
    optimizer, replicas = comparison.optimizer(contender), [cell.replica for cell in cells]
    label = f"{label} {_name(task)}: {_name(contender)} x {len(cells)}"
    with cell_files.progress(task.steps, label) as progress:
        found = train(
            problem,
            optimizer,
            replicas,
            steps=task.steps,
            every=task.every,
            programs=programs,
            progress=progress,
        )
    speeds = speed(problem, optimizer, replicas[0], steps=task.steps, programs=programs)
    for cell, result in zip(cells, found, strict=True):
        content = {**cell.replica._asdict(), **result, **speeds}
        cell_files.write(cell.path, report.plain(content))


@cache
def _prepare(task: AnyTask) -> tuple[Problem, Any]:
    problem = task.build()
    return problem, cache(partial(Programs, problem))


def _name(one: AnyTask | Contender) -> str:
    kind = one.rule.kind if isinstance(one, Contender) else one.kind
    return one.name or kind
