"""The command `continual`: methods against forgetting, and what forgets by itself, side by side."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import numpy as np

from hope_jax import config, sharding
from hope_jax.comparison import cells as cell_files
from hope_jax.comparison.digits import SIDE
from hope_jax.comparison.digits import draw as draw_digits
from hope_jax.data.cifar import CifarConfig
from hope_jax.data.intents import Classes, IntentsConfig, split
from hope_jax.evaluation.intents import summary
from hope_jax.evaluation.page import draw_grid, write_page
from hope_jax.models.decoder import ModelConfig
from hope_jax.optimizers import OptimizerConfig, ScheduleConfig
from hope_jax.records import record
from hope_jax.suites.continual import Classifier, Method, learn, plan
from hope_jax.training import metrics


@dataclass(frozen=True, kw_only=True)
class DigitsConfig:
    """Digits of the built-in font, noisy and out of place, in 16 grey levels, row by row.

    Attributes:
      examples: Of training; 1,024 are for the test.
      noise: Deviation of the noise on each pixel, where ink is 1/2 to 1.
    """

    kind: Literal["digits"] = "digits"
    examples: int = 4096
    noise: float = 0.3

    def __post_init__(self):
        if self.examples < 100:
            raise ValueError(f"examples must be at least 100, got {self.examples}")

    @property
    def symbols(self) -> int:
        """Ids of the inputs."""
        return 16

    def load(self) -> tuple[Classes, Classes]:
        """Draws the training and the test part."""
        return self._draw(self.examples, 0), self._draw(1024, 2)

    def _draw(self, count: int, part: int) -> Classes:
        images, labels = draw_digits(count, (part,), noise=self.noise)
        grey = np.clip((np.asarray(images) + 0.5) / 2, 0, 1) * (self.symbols - 1)
        inputs = grey.round().astype(np.int32).reshape(count, SIDE * SIDE)
        return Classes(inputs, np.full(count, SIDE * SIDE, np.int32), np.asarray(labels))


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """A classifier that takes part.

    Attributes:
      name: In files and tables.
      model: A decoder's settings, without vocabulary; null for an MLP on the levels of pixels.
    """

    name: str
    model: ModelConfig | None = None


@dataclass(frozen=True, kw_only=True)
class Continual:
    """Models x methods x seeds on classes that come in groups.

    All see the same examples in the same order. A test example is one of all classes seen so far,
    and which group it is of is not told, unless `known_task`. Models are trained from scratch.

    Attributes:
      data: What is classified.
      models: What learns it.
      methods: What is done against forgetting.
      groups: How many; the classes are dealt out to them by the seed.
      steps: Batches of each group.
      batch: Examples of a batch.
      seeds: Of the order of classes, of batches and of parameters.
      optimizer: How all are trained.
      reset: Whether the optimizer forgets behind each group.
      known_task: Whether an example's group is told, in training and test: an easier question.
      folder: Where the results lie; these lie in the folder of their name there.
      name: Of the results and of their folder; the config file's by default.
    """

    data: IntentsConfig | DigitsConfig | CifarConfig
    models: tuple[Entrant, ...]
    methods: tuple[Method, ...] = (
        Method(name="fine_tuning"),
        Method(name="ewc", strength=100.0),
        Method(name="replay", replay=5),
        Method(name="everything", everything=True),
    )
    groups: int = 10
    steps: int = 300
    batch: int = 32
    seeds: tuple[int, ...] = (0, 1, 2)
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            weight_decay=0.0, schedule=ScheduleConfig(kind="constant")
        )
    )
    reset: bool = False
    known_task: bool = False
    folder: str = "runs"
    name: str = "continual"

    def __post_init__(self):
        models, methods = ([one.name for one in some] for some in (self.models, self.methods))
        named = {"models": models, "methods": methods, "seeds": self.seeds}
        cell_files.check(named, self.name)
        for name, least in (("groups", 1), ("steps", 1), ("batch", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if isinstance(self.data, IntentsConfig) and any(m.model is None for m in self.models):
            raise ValueError("models must have a model for text, got null, an MLP on pixels")


class Cell(NamedTuple):
    """One run, and the file of what it found.

    Attributes:
      entrant: What learns.
      method: What is done against forgetting.
      seed: From which seed.
      path: Named after all settings that the run depends on.
    """

    entrant: Entrant
    method: Method
    seed: int
    path: Path


def load(path: str, overrides: Sequence[str] = ()) -> Continual:
    """Reads a config, see `hope_jax.config.load`."""
    return config.read(Continual, path, overrides)


def run(settings: Continual) -> Path:
    """Trains what has not been, model by model, and writes the report.

    Args:
      settings: What to train.

    Returns:
      The folder, with report.html, pictures, records.json and the cells.

    Raises:
      ConfigError: Data is missing, or has fewer classes than groups.
    """
    folder = Path(settings.folder) / settings.name
    every = list(cells(settings, folder))
    missing = [cell for cell in every if not cell.path.exists()]
    if missing:
        with config.blame("data"):
            data = settings.data.load()
            classes = len(np.unique(data[0].labels))
            if classes < settings.groups:
                raise ValueError(f"groups must be at most {classes}, got {settings.groups}")
        with sharding.use(sharding.MeshConfig().build(jax.devices()[:1])):
            for entrant in dict.fromkeys(cell.entrant for cell in missing):
                _run_cells(settings, data, [one for one in missing if one.entrant == entrant])
    _report(settings, folder, {cell: cell_files.read(cell.path) for cell in every})
    return folder


def cells(settings: Continual, folder: Path) -> Iterator[Cell]:
    """All runs."""
    free = ("models", "methods", "seeds", "folder", "name")
    same = {name: value for name, value in asdict(settings).items() if name not in free}
    for entrant in settings.models:
        model = None if entrant.model is None else asdict(entrant.model)
        for method in settings.methods:
            for seed in settings.seeds:
                place = folder / "cells" / entrant.name / method.name
                path = cell_files.path(place, f"{seed}", [same, model, asdict(method), seed])
                yield Cell(entrant, method, seed, path)


def _run_cells(settings: Continual, data: tuple[Classes, Classes], cells: list[Cell]):
    """Trains a model's missing runs together and writes what they found."""
    train = data[0]
    groups = [split(np.asarray(train.labels), settings.groups, cell.seed) for cell in cells]
    plans = [
        plan(
            train,
            its,
            cell.method,
            steps=settings.steps,
            batch=settings.batch,
            seed=cell.seed,
            known_task=settings.known_task,
        )
        for cell, its in zip(cells, groups, strict=True)
    ]
    model = cells[0].entrant.model
    symbols = settings.data.symbols
    classifier = Classifier(
        model if model is None else replace(model, vocabulary=symbols),
        symbols=symbols,
        length=train.inputs.shape[1],
        classes=1 + int(train.labels.max()),
    )
    label = f"{cells[0].entrant.name} x {len(cells)}"
    with cell_files.progress(settings.groups, label) as progress:
        found = learn(
            classifier,
            settings.optimizer,
            data,
            groups,
            plans,
            reset=settings.reset,
            progress=progress,
        )
    for cell, matrix in zip(cells, found, strict=True):
        cell_files.write(cell.path, {"matrix": matrix.tolist(), **summary(matrix)})


def _report(settings: Continual, folder: Path, results: dict[Cell, dict]):
    """Writes report.html, a picture of each mean accuracy matrix, and records.json."""
    numbers, pictures, records = {}, [], []
    names = range(1, settings.groups + 1)
    for entrant in settings.models:
        for method in settings.methods:
            key = entrant.name, method.name
            mine = [r for c, r in results.items() if (c.entrant.name, c.method.name) == key]
            title = "/".join(key)
            for measure in summary(np.array(mine[0]["matrix"])):
                values = np.array([found[measure] for found in mine])
                numbers[f"{title}/{measure}"] = float(values.mean())
                notes = {"seeds": values.round(5).tolist(), "known_task": settings.known_task}
                made = record(f"{settings.name}/{title}/{measure}", values.mean(), "share", notes)
                records.append({**made, **cell_files.whence(mine[0])})
            grid = np.mean([found["matrix"] for found in mine], axis=0)
            about = f"{entrant.name}, {method.name}: mean over {len(mine)} seeds"
            pictures.append(
                draw_grid(
                    "-".join(key), about, grid, ("trained up to group", names), ("tested on", names)
                )
            )
    said = "told" if settings.known_task else "not told"
    about = f"Accuracy on groups of classes; the group of a test example is {said}."
    write_page(folder, "report", about, pictures, numbers)
    metrics.replace(folder / "records.json", json.dumps(records, indent=1) + "\n")
