"""What a comparison found: a web page that needs nothing else, pictures, and records in JSON."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from hope_jax.comparison.cells import whence
from hope_jax.comparison.replicas import Replica
from hope_jax.evaluation.page import Picture, Section, png, write_sections
from hope_jax.records import record
from hope_jax.training import metrics

Results = Mapping[tuple[str, str, Replica], dict[str, Any]]
"""What each run found, by task, optimizer and replica; see `hope_jax.comparison.replicas`."""

ABOUT = (
    "Every optimizer had the same learning rates (times a factor of its own), seeds, steps and "
    "batches. The rate was chosen by validation, mean over the seeds; figures are the mean over "
    "seeds at that rate, with the lowest and the highest in brackets. Test figures are of the "
    "parameters that validation chose. Speed is that of one run alone on the device, after a "
    "warm-up."
)


class Row(NamedTuple):
    """An optimizer on a task, at its best learning rate.

    Attributes:
      name: The optimizer's.
      rate: The best learning rate.
      edge: "lowest" or "highest" where a rate beyond those tried may be better, else "".
      by_rate: Validation loss of each seed (rates, seeds), and the rates.
      runs: What the runs at the best rate found, one for each seed.
      valid: Validation loss of the runs.
      to_goal: Steps after which each stayed below the task's goal; inf for never.
      match: Seconds until the mean validation loss was the first optimizer's last; inf for never.
    """

    name: str
    rate: float
    edge: str
    by_rate: tuple[np.ndarray, np.ndarray]
    runs: list[dict[str, Any]]
    valid: np.ndarray
    to_goal: np.ndarray
    match: float

    @property
    def step_ms(self) -> float:
        """Milliseconds of a training step."""
        return 1e3 * self.runs[0]["step_seconds"]

    @property
    def update_ms(self) -> float:
        """Milliseconds of the optimizer's part of it."""
        return 1e3 * self.runs[0]["update_seconds"]

    @property
    def state(self) -> float:
        """Bytes of optimizer state for each parameter."""
        return self.runs[0]["state_bytes"] / self.runs[0]["about"]["parameters"]


def write(folder: Path, name: str, results: Results, goals: Mapping[str, float | None]):
    """Writes report.html, TASK.png for each task, and records.json.

    Args:
      folder: Where to.
      name: Of the comparison.
      results: All of them.
      goals: Of the tasks, by name.
    """
    sections, records = [], []
    for task, goal in goals.items():
        rows = rank(task, results, goal)
        sections.append(_section(task, rows, goal))
        records += _records(f"{name}/{task}", rows, goal)
    write_sections(folder, "report", name, ABOUT, sections)
    metrics.replace(folder / "records.json", json.dumps(plain(records), indent=1) + "\n")


def rank(task: str, results: Results, goal: float | None) -> list[Row]:
    """Chooses the best rate of every optimizer by validation; the order stays that of `results`."""
    names = list(dict.fromkeys(optimizer for found, optimizer, _ in results if found == task))
    rows: list[Row] = []
    for name in names:
        mine = {key[2]: run for key, run in results.items() if key[:2] == (task, name)}
        rates = sorted({replica.rate for replica in mine})
        runs = [[run for r, run in mine.items() if r.rate == rate] for rate in rates]
        losses = np.array([[_number(run["judged"]["loss"]) for run in some] for some in runs])
        to_goal = np.array([[_steps_to(run, goal) for run in some] for some in runs])
        order = zip(to_goal.mean(1), losses.mean(1), strict=True)
        best = min(enumerate(order), key=lambda pair: pair[1])[0]
        edge = {0: "lowest", len(rates) - 1: "highest"}.get(best, "") if len(rates) > 1 else ""
        first = rows[0].valid.mean() if rows else losses[best].mean()
        rows.append(
            Row(
                name,
                rates[best],
                edge,
                (np.array(rates), losses),
                runs[best],
                losses[best],
                to_goal[best],
                _seconds_to(runs[best], first),
            )
        )
    return rows


def plain(value: Any) -> Any:
    """Makes a tree what JSON has: NumPy's numbers are plain ones, those that it lacks are null."""
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    return None if isinstance(value, float) and not math.isfinite(value) else value


def verdict(rows: list[Row], goal: float | None) -> str:
    """Says in a sentence who won and by how much against the spread."""
    by_goal = goal is not None
    measure = {row.name: row.to_goal if by_goal else row.valid for row in rows}
    first, *rest = sorted(rows, key=lambda row: measure[row.name].mean())
    what = f"steps to stay below {goal:g}" if by_goal else "validation loss"
    if not np.isfinite(measure[first.name]).all():
        return f"No optimizer came to {what} with every seed."
    said = f"Best by {what}: {first.name}, {_spread(measure[first.name])}"
    if rest:
        said += f"; next {rest[0].name}, {_spread(measure[rest[0].name])}"
    return said + " (mean over seeds, lowest to highest)."


def _number(value: float | None) -> float:
    return math.inf if value is None else value


def _steps_to(run: dict[str, Any], goal: float | None) -> float:
    """The evaluated step from which on all losses are below the goal; 0 where there is no goal."""
    if goal is None:
        return 0.0
    steps, losses = run["valid_steps"], [_number(x) for x in run["valid"]["loss"]]
    late = [i for i, loss in enumerate(losses) if not loss <= goal]
    after = late[-1] + 1 if late else 0
    return float(steps[after]) if after < len(steps) else math.inf


def _curve(runs: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Evaluated steps, and validation losses (seeds, steps)."""
    losses = [[_number(x) for x in run["valid"]["loss"]] for run in runs]
    return np.array(runs[0]["valid_steps"]), np.array(losses)


def _seconds_to(runs: list[dict[str, Any]], loss: float) -> float:
    steps, losses = _curve(runs)
    there = np.flatnonzero(losses.mean(0) <= loss)
    return steps[there[0]] * runs[0]["step_seconds"] if there.size else math.inf


def _spread(values: np.ndarray) -> str:
    mean, low, high = values.mean(), values.min(), values.max()
    return f"{_short(mean)} ({_short(low)} to {_short(high)})"


def _short(value: float) -> str:
    if not math.isfinite(value):
        return "never" if value > 0 else "none"
    return f"{value:.4f}" if 1e-3 <= abs(value) < 100 else f"{value:.4g}"


def _columns(rows: list[Row], goal: float | None) -> dict[str, list[str]]:
    """The table of a task, by column."""
    base = rows[0]
    table = {
        "optimizer": [row.name for row in rows],
        "best rate": [f"{row.rate:g}" + f" ({row.edge} tried)" * bool(row.edge) for row in rows],
        "validation loss": [_spread(row.valid) for row in rows],
    }
    if goal is not None:
        table[f"steps to {goal:g}"] = [_spread(row.to_goal) for row in rows]
    for name in base.runs[0]["test"]:
        values = [[_number(run["test"][name]) for run in row.runs] for row in rows]
        table[f"test {name}"] = [_spread(np.array(value)) for value in values]
    words = base.runs[0]["about"].get("test_words")
    if words:
        values = [[_number(run["test_sums"]["loss"]) for run in row.runs] for row in rows]
        table["test perplexity per word"] = [
            _spread(np.exp(np.array(value) / words)) for value in values
        ]
    table |= {
        "ms a step": [f"{row.step_ms:.3g}" for row in rows],
        f"of {base.name}'s": [f"{row.step_ms / base.step_ms:.2f}" for row in rows],
        "ms of the optimizer": [f"{row.update_ms:.3g}" for row in rows],
        f"seconds to {base.name}'s loss": [_short(row.match) for row in rows],
        "state, bytes a parameter": [f"{row.state:.1f}" for row in rows],
    }
    return table


def _records(name: str, rows: list[Row], goal: float | None) -> list[dict[str, Any]]:
    """The figures of a task in the form of all benchmarks, those of runs with their spread."""
    records = []
    for row in rows:
        steps, losses = _curve(row.runs)
        some = np.unique(np.linspace(0, len(steps) - 1, 16).round().astype(int))
        notes = {
            "rate": row.rate,
            "edge": row.edge,
            "seeds": len(row.runs),
            "valid_by_rate": dict(
                zip(map(str, row.by_rate[0]), row.by_rate[1].mean(1).round(5), strict=True)
            ),
            "valid_by_step": dict(
                zip(map(str, steps[some]), losses.mean(0)[some].round(5), strict=True)
            ),
            **row.runs[0]["about"],
        }
        figures: dict[str, tuple[np.ndarray, str, dict[str, Any]]] = {
            "valid_loss": (row.valid, "loss", notes),
            "step": (np.array([row.step_ms]), "ms", {}),
            "update": (np.array([row.update_ms]), "ms", {}),
            "state": (np.array([row.state]), "bytes per parameter", {}),
        }
        if goal is not None:
            figures["steps_to_goal"] = row.to_goal, f"steps to stay below {goal:g}", {}
        for measure in row.runs[0]["test"]:
            values = np.array([_number(run["test"][measure]) for run in row.runs])
            figures[f"test_{measure}"] = values, measure, {}
        for key, (values, unit, more) in figures.items():
            spread = {"lowest": values.min(), "highest": values.max()} if values.size > 1 else {}
            made = record(f"{name}/{row.name}/{key}", values.mean(), unit, {**spread, **more})
            records.append({**made, **whence(row.runs[0])})
    return records


def _draw(rows: list[Row], goal: float | None) -> bytes:
    """A PNG of the loss by step, by second, and by learning rate."""
    figure = Figure(figsize=(15, 5.2), layout="constrained")
    by_step, by_second, by_rate = figure.subplots(1, 3)
    highest, lowest = 0.0, math.inf
    for i, row in enumerate(rows):
        style = {"color": f"C{i % 10}", "linestyle": ("-", "--", ":")[i // 10 % 3]}
        steps, losses = _curve(row.runs)
        losses = np.where(np.isfinite(losses), losses, np.nan)
        highest, lowest = max(highest, losses[:, 0].max()), min(lowest, np.nanmin(losses))
        for axes, x in ((by_step, steps), (by_second, steps * row.step_ms / 1e3)):
            axes.plot(x, losses.mean(0), label=row.name, linewidth=1.4, **style)
            axes.fill_between(x, losses.min(0), losses.max(0), alpha=0.15, color=style["color"])
        rates, tried = row.by_rate
        tried = np.where(np.isfinite(tried), tried, np.nan)
        by_rate.plot(rates, tried.mean(1), marker=".", linewidth=1.4, **style)
        by_rate.fill_between(rates, tried.min(1), tried.max(1), alpha=0.15, color=style["color"])
    names = ("step", "second (one run alone)", "learning rate")
    for axes, name in zip((by_step, by_second, by_rate), names, strict=True):
        axes.set_xlabel(name)
        axes.grid(alpha=0.3)
        if goal is not None and axes is not by_rate:
            axes.axhline(goal, color="black", linewidth=0.8, linestyle=":")
        if lowest < highest / 20:
            axes.set_yscale("log")
            axes.set_ylim(max(lowest / 1.5, 1e-6 * highest), 2 * highest)
        else:
            axes.set_ylim(lowest - 0.03 * (highest - lowest), highest + 0.03 * (highest - lowest))
    by_rate.set_xscale("log")
    by_step.set_ylabel("validation loss")
    figure.legend(*by_step.get_legend_handles_labels(), loc="outside lower center", ncols=8)
    return png(figure)


def _section(task: str, rows: list[Row], goal: float | None) -> Section:
    columns = _columns(rows, goal)
    run = rows[0].runs[0]
    seeds, tried = len(rows[0].runs), len(rows[0].by_rate[0])
    devices = ", ".join(sorted({run["device"] for row in rows for run in row.runs}))
    about = (
        f"{run['about']['parameters']:,} parameters, {run['valid_steps'][-1]:,} steps, "
        f"{tried} learning rates and {seeds} seeds for each optimizer, on {devices}. "
        f"{verdict(rows, goal)}"
    )
    picture = Picture(task, "Loss by step, by second and by learning rate.", _draw(rows, goal))
    return Section(task, about, [picture], [[*columns], *zip(*columns.values(), strict=True)])
