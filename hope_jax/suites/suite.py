"""The command `suite`: trains the models of a config on its tasks, and goes on where it was."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from hope_jax import config, sharding
from hope_jax.comparison import cells as cell_files
from hope_jax.data.synthetic import RecallConfig
from hope_jax.data.synthetic_formal import FormalConfig, WordsConfig
from hope_jax.data.synthetic_labels import Labelled, draw, stack
from hope_jax.data.synthetic_mad import MadConfig
from hope_jax.models.decoder import ModelConfig
from hope_jax.optimizers import OptimizerConfig
from hope_jax.suites import report
from hope_jax.suites.train import Learner, Recipe, Replica, Splits, train

AnyTask = FormalConfig | WordsConfig | MadConfig | RecallConfig


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """A model that takes part.

    Attributes:
      name: In files and tables.
      model: Its settings; the vocabulary is that of the tasks.
    """

    name: str
    model: ModelConfig


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Models x tasks x learning rates x seeds.

    Every model has the same budget. The rate with the least loss on `valid`, mean over the seeds,
    counts for it on a task; tests decide nothing. Runs of a model on tasks of one size train in one
    program.

    Attributes:
      tasks: What is learned.
      models: What learns it.
      rates: Learning rates that are tried.
      seeds: Where parameters start.
      optimizer: Its learning rate is replaced by `rates`.
      steps: Of a run.
      every: Steps between evaluations.
      batch: Examples of a step.
      at_once: The most runs in one program.
      folder: Where suites lie; this one lies in the folder of its name there.
      name: Of the suite and of its folder; the config file's by default.
    """

    tasks: tuple[AnyTask, ...]
    models: tuple[Entrant, ...]
    rates: tuple[float, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    steps: int = 3000
    every: int = 500
    batch: int = 32
    at_once: int = 64
    folder: str = "runs"
    name: str = "suite"

    def __post_init__(self):
        titles = [task.about.title for task in self.tasks]
        models = [entrant.name for entrant in self.models]
        named = {"tasks": titles, "models": models, "rates": self.rates, "seeds": self.seeds}
        cell_files.check(named, self.name)
        for name in ("steps", "every", "batch", "at_once"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def recipe(self) -> Recipe:
        """How each run is trained."""
        return Recipe(self.optimizer, self.steps, self.every, self.batch)


class Cell(NamedTuple):
    """One run of a suite, and the file of what it found.

    Attributes:
      task: What is learned.
      entrant: By which model.
      rate: At which learning rate.
      seed: From which seed.
      path: Named after all settings that the run depends on.
    """

    task: AnyTask
    entrant: Entrant
    rate: float
    seed: int
    path: Path


def run(suite: Suite) -> Path:
    """Trains what has not been, and writes the report.

    The result of a run is a JSON file in the folder of the suite; a run that has one with the same
    settings is never made again. Files are written program by program.

    Args:
      suite: What to train.

    Returns:
      The folder, with report.html, a picture, records.json and the cells.
    """
    folder = Path(suite.folder) / suite.name
    todo = [some for some in _programs(suite, folder) if some]
    with sharding.use(sharding.MeshConfig().build(jax.devices()[:1])):
        for number, some in enumerate(todo, 1):
            _run_cells(suite, some, f"{number}/{len(todo)} {some[0].entrant.name} x {len(some)}")
    results = {
        (cell.task, cell.entrant.name, cell.rate, cell.seed): cell_files.read(cell.path)
        for cell in cells(suite, folder)
    }
    report.write(folder, suite.name, results)
    return folder


def cells(suite: Suite, folder: Path) -> Iterator[Cell]:
    """All runs of a suite."""
    recipe = [asdict(replace(suite.optimizer, learning_rate=0.0)), suite.steps, suite.batch]
    for entrant in suite.models:
        for task in suite.tasks:
            settings = [asdict(task), asdict(entrant.model), recipe]
            for rate in suite.rates:
                for seed in suite.seeds:
                    place = folder / "cells" / task.about.title / entrant.name
                    path = cell_files.path(place, f"{rate:g}-{seed}", [*settings, rate, seed])
                    yield Cell(task, entrant, rate, seed, path)


def load(path: str, overrides: Sequence[str] = ()) -> Suite:
    """Reads a config, see `hope_jax.config.load`."""
    return config.read(Suite, path, overrides)


def _programs(suite: Suite, folder: Path) -> Iterator[list[Cell]]:
    """The missing cells, by what trains in one program."""
    missing = [cell for cell in cells(suite, folder) if not cell.path.exists()]
    groups: dict[tuple, list[Cell]] = {}
    for cell in missing:
        groups.setdefault((cell.entrant, *_size(cell.task)), []).append(cell)
    for group in groups.values():
        pieces = -(-len(group) // suite.at_once)
        size = -(-len(group) // pieces)
        for start in range(0, len(group), size):
            yield group[start : start + size]


def _run_cells(suite: Suite, cells: list[Cell], label: str):
    """Trains some runs of a model together and writes what they found."""
    tasks = list(dict.fromkeys(cell.task for cell in cells))
    parts = [_examples(task) for task in tasks]
    train_split, *judged = (stack_tasks(some) for some in zip(*parts, strict=True))
    names = ("valid", *tasks[0].about.tests)
    splits = Splits(train_split, dict(zip(names, judged, strict=True)))
    symbols = max(task.about.symbols for task in tasks)
    model = replace(cells[0].entrant.model, vocabulary=symbols)
    length = train_split.inputs.shape[-1]
    learner = Learner(model, length=length, summary=tasks[0].about.summary)
    replicas = [Replica(tasks.index(cell.task), cell.rate, cell.seed) for cell in cells]
    start = time.perf_counter()
    with cell_files.progress(suite.steps, label) as progress:
        found = train(learner, suite.recipe, splits, replicas, progress=progress)
    seconds = (time.perf_counter() - start) / len(cells)
    about = {"parameters": model.parameters(), "seconds": seconds}
    for cell, result in zip(cells, found, strict=True):
        cell_files.write(cell.path, {**about, **result})


def stack_tasks(parts: Sequence[Labelled]) -> Labelled:
    """Stacks the examples of tasks as long as the longest."""
    return Labelled(*(np.asarray(x) for x in stack(list(parts))))


@cache
def _examples(task: AnyTask) -> tuple[Labelled, ...]:
    """All splits: train, valid and the tests."""
    return tuple(draw(task, split) for split in ("train", "valid", *task.about.tests))


def _size(task: AnyTask) -> tuple:
    """What tasks of one program have in common."""
    about = task.about
    shapes = [task.example(split, 0).inputs.shape for split in ("train", *about.tests)]
    return about.symbols, about.summary, about.tests, task.examples, task.held_out, *shapes
