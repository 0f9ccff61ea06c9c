"""What a suite found: a web page that needs nothing else, a picture, and records in JSON."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from hope_jax.comparison.cells import whence
from hope_jax.data.synthetic_labels import LabelledTask
from hope_jax.evaluation.page import Picture, Section, png, write_sections
from hope_jax.records import record
from hope_jax.training import metrics

Results = Mapping[tuple[Any, str, float, int], dict[str, Any]]
"""What each run found, by task, model, rate and seed; see `hope_jax.suites.train`."""


class Row(NamedTuple):
    """A model on a task, at its best learning rate.

    Attributes:
      task: The task.
      name: The model's.
      rate: The best learning rate: that of the least mean loss on `valid`.
      edge: Whether it is the lowest or the highest of several that were tried.
      runs: What the runs at that rate found, one for each seed.
      best: The highest score in the last test of any run at any rate.
    """

    task: LabelledTask
    name: str
    rate: float
    edge: bool
    runs: list[dict[str, Any]]
    best: float

    def scores(self, test: str, measure: str | None = None) -> np.ndarray:
        """A measure of a test, or the task's own, for each seed."""
        return np.array([run["found"][test][measure or self.task.about.score] for run in self.runs])


def rank(results: Results) -> list[Row]:
    """Chooses the best rate of every model on every task."""
    rows = []
    for task, name in dict.fromkeys(key[:2] for key in results):
        mine = {key[2:]: run for key, run in results.items() if key[:2] == (task, name)}
        rates = sorted({rate for rate, _ in mine})
        runs = [[run for (other, _), run in mine.items() if other == rate] for rate in rates]
        losses = [np.mean([run["found"]["valid"]["loss"] for run in some]) for some in runs]
        best = int(np.argmin(np.nan_to_num(losses, nan=np.inf)))
        edge = len(rates) > 1 and best in (0, len(rates) - 1)
        test = task.about.tests[-1]
        highest = max(run["found"][test][task.about.score] for run in mine.values())
        rows.append(Row(task, name, rates[best], edge, runs[best], highest))
    return rows


def write(folder: Path, name: str, results: Results):
    """Writes report.html, scores.png and records.json.

    Args:
      folder: Where to.
      name: Of the suite.
      results: All of them.
    """
    rows = rank(results)
    run = rows[0].runs[0]
    sizes = {row.name: row.runs[0]["parameters"] for row in rows}
    parameters = ", ".join(f"{model} {size:,}" for model, size in sizes.items())
    devices = ", ".join(sorted({run["device"] for row in rows for run in row.runs}))
    about = (
        f"Scores in per cent: the mean over {len(rows[0].runs)} seeds after {run['steps'][-1]:,} "
        "steps at the learning rate whose mean loss on held-out examples like those of training "
        "was least. Of formal languages and words, a string counts only if the label after each of "
        "its symbols is right, and the last bin's strings are longer than any in training. "
        f"Parameters: {parameters}. On {devices}."
    )
    shown = "Score of the last test by step, mean over seeds, lowest to highest."
    section = Section("", "", [Picture("scores", shown, _draw(rows))], _table(rows))
    write_sections(folder, "report", name, about, [section])
    metrics.replace(folder / "records.json", json.dumps(_records(name, rows), indent=1) + "\n")


def _records(name: str, rows: list[Row]) -> list[dict[str, Any]]:
    records = []
    for row in rows:
        for test in row.task.about.tests:
            scores = row.scores(test)
            notes = {
                "seeds": scores.round(5).tolist(),
                "rate": row.rate,
                "at_edge": row.edge,
                "macro": float(row.scores(test, "macro").mean()),
                "accuracy": float(row.scores(test, "accuracy").mean()),
                "steps": row.runs[0]["steps"][-1],
                "parameters": row.runs[0]["parameters"],
            }
            title = f"{name}/{row.task.about.title}/{row.name}/{test}"
            made = record(title, float(scores.mean()), f"share of {row.task.about.score}", notes)
            records.append({**made, **whence(row.runs[0])})
    return records


def _table(rows: list[Row]) -> list[list[str]]:
    """A line for each model, a column for each task, in per cent."""
    tasks, names = (list(dict.fromkeys(getattr(r, x) for r in rows)) for x in ("task", "name"))
    head = ["model", *(f"{task.about.title}\n{' / '.join(task.about.tests)}" for task in tasks)]
    found = {(row.name, row.task): _cell(row) for row in rows}
    guess = ["a guess", *(f"{100 * task.about.chance:.1f}" for task in tasks)]
    return [head, *([name, *(found[name, task] for task in tasks)] for name in names), guess]


def _cell(row: Row) -> str:
    scores = [row.scores(test) for test in row.task.about.tests]
    mean = " / ".join(f"{100 * score.mean():.1f}" for score in scores)
    last = f"{100 * scores[-1].min():.1f} to {100 * scores[-1].max():.1f}"
    rate = f"{row.rate:g}" + " (edge)" * row.edge
    return f"{mean}\n{last} by seed, at {rate}; best of all runs {100 * row.best:.1f}"


def _draw(rows: list[Row]) -> bytes:
    """A PNG of the last test's score by step, a panel for each task."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    columns = min(3, len(tasks))
    lines = -(-len(tasks) // columns)
    figure = Figure(figsize=(5 * columns, 3.4 * lines), layout="constrained")
    panels = np.atleast_1d(figure.subplots(lines, columns, squeeze=False)).ravel()
    for axes in panels[len(tasks) :]:
        axes.set_axis_off()
    for task, axes in zip(tasks, panels, strict=False):
        test, score = task.about.tests[-1], task.about.score
        for i, row in enumerate(row for row in rows if row.task == task):
            steps = row.runs[0]["steps"]
            curves = np.array([run["curves"][test][score] for run in row.runs])
            axes.plot(steps, curves.mean(0), color=f"C{i % 10}", label=row.name)
            axes.fill_between(steps, curves.min(0), curves.max(0), color=f"C{i % 10}", alpha=0.15)
        axes.axhline(task.about.chance, color="black", linewidth=0.8, linestyle=":")
        axes.set(title=f"{task.about.title}: {test}", xlabel="step", ylim=(-0.03, 1.03))
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("score")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return png(figure)
