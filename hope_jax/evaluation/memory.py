"""What memories do while a model reads: their lengths, moves and gates, as pictures on one page."""

import json
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from hope_jax.evaluation.page import Picture, png, write_page
from hope_jax.evaluation.read import text_tokens
from hope_jax.evaluation.subject import Results, Subject, TaskError
from hope_jax.models.adapt import Reading, norms, read
from hope_jax.models.decoder import BlockMemory, Decoder
from hope_jax.ops.continuum import LevelMemory

BESIDE = ("convolution", "held", "momentum")
"""Parts of a sequence layer's memory that are not drawn."""

CELLS = 64
"""Grids of so many numbers have them written into their cells."""

MARKS = 200
"""The most moves of a level that are drawn."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Draws a model's memories while it reads one text with them.

    The page shows the length of every memory of the sequence layers and of every level's deltas (a
    mean over layers) with the tokens at which levels move, what the gates of each head do at a
    token that says nothing to them, and how alike the levels have become.

    Attributes:
      file: A UTF-8 text; the beginning of the run's `split` without one.
      split: Which part of the run's data, where no file is given.
      tokens: The most that are read.
      points: How often memories are measured on the way.
    """

    file: str | None = None
    split: str = "valid"
    tokens: int = 16384
    points: int = 64

    def __post_init__(self):
        for name in ("tokens", "points"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def run(self, subject: Subject) -> Results:
        """Reads and draws; returns each level's moves, those left out, and the last lengths."""
        tokens = self._tokens(subject)
        model = subject.model
        stride = -(-tokens.shape[1] // self.points)
        memory, places, rows = read(model, tokens[:, :0]), [], []
        for start in subject.track(range(0, tokens.shape[1], stride)):
            memory = read(model, tokens[:, start : start + stride], memory)
            places.append(min(start + stride, tokens.shape[1]))
            rows.append(lengths(memory))
        curves = {name: np.array([row[name] for row in rows]) for name in rows[0]}
        tower = memory.memory if isinstance(memory, Reading) else memory
        chunks = {
            f"level {index}": level.chunk or 0
            for index, level in enumerate(model.config.continuum.levels)
        }
        found: Results = {"tokens": tokens.shape[1], **counts(tower)}
        found |= {f"{name}_length": float(curve[-1]) for name, curve in curves.items()}
        pictures = [
            draw_lengths(np.array(places), curves, chunks),
            draw_grids(gates(model), "layer", "head", "at a neutral token"),
            draw_grids(likeness(tower), "level", "level", "of what deltas add"),
        ]
        lines = {"places": places} | {name: curve.tolist() for name, curve in curves.items()}
        about = "What memories do while the model reads."
        drawn = [picture for picture in pictures if picture is not None]
        page = write_page(subject.folder, "memory", about, drawn, found)
        (subject.folder / "memory-lengths.json").write_text(json.dumps(lines), "utf-8")
        return found | {"page": str(page)}

    def _tokens(self, subject: Subject) -> np.ndarray:
        if self.file is not None:
            return text_tokens(subject, self.file, begin=True)[:, : self.tokens]
        stream = subject.stream(self.split)
        if not stream.info.tokens:
            raise TaskError(f"split {self.split!r} must hold at least 1 token, got 0")
        return stream.read(0, min(self.tokens, stream.info.tokens)).tokens[None].astype(np.int32)


def lengths(memory: BlockMemory | Reading) -> dict[str, float]:
    """The length of each memory of a sequence, as a mean over layers (and of deltas by level)."""
    tower = memory.memory if isinstance(memory, Reading) else memory
    found: dict[str, float] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tower.mixer):
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if leaf.ndim > 3 and not any(part in name for part in BESIDE):
            squares = np.sum(np.square(np.asarray(leaf, np.float64)), tuple(range(1, leaf.ndim)))
            found[name.removeprefix("fast.")] = float(np.sqrt(squares).mean())
    for index, norm in norms(memory).items():
        found[f"level {index}"] = float(norm.mean())
    return found


def counts(tower: BlockMemory) -> Results:
    """How often each level moved, and how often it did not and why, in all layers together."""
    found: Results = {}
    for index, level in enumerate(tower.continuum):
        if isinstance(level, LevelMemory):
            for name in ("writes", "gated", "skipped"):
                found[f"level_{index}_{name}"] = int(getattr(level.fast, name).sum())
    return found


def gates(model: Decoder) -> dict[str, Float[np.ndarray, "layers H"]]:
    """What gates of the sequence layers say without an input: the sigmoid of their biases."""
    mixer = model.blocks.mixer
    found = {name: bias[...] for name, bias in getattr(mixer, "biases", {}).items()}
    frame = getattr(mixer, "frame", None)
    if frame is not None and frame.gate_names:
        found |= {name: frame.gates.bias[:, i] for i, name in enumerate(frame.gate_names)}
    return {name: np.asarray(jax.nn.sigmoid(bias)) for name, bias in found.items()}


def likeness(tower: BlockMemory) -> dict[str, Float[np.ndarray, "levels levels"]]:
    """How alike the directions are that levels' deltas add to the model's features.

    The cosine between `D^T D` of two levels, D what the last layer of a level adds, as a mean over
    layers and sequences: 1 for the same directions, 0 for none in common.
    """
    outputs = [
        np.asarray(level.fast.delta[-1][:, :, 0], np.float64)
        for level in tower.continuum
        if isinstance(level, LevelMemory)
    ]
    if len(outputs) < 2:
        return {}

    def overlap(one, other):  # of the two D^T D
        return np.sum(np.square(one @ np.swapaxes(other, -1, -2)), (-2, -1))

    sizes = [np.sqrt(overlap(delta, delta)) + 1e-30 for delta in outputs]
    known = list(zip(outputs, sizes, strict=True))
    cosines = [[np.mean(overlap(a, b) / (x * y)) for b, y in known] for a, x in known]
    return {"likeness": np.array(cosines)}


def draw_lengths(
    places: np.ndarray, curves: dict[str, np.ndarray], chunks: dict[str, int]
) -> Picture:
    """Draws the length of every memory over the stream, and where levels move."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, title in zip(panels, ("sequence layers", "levels"), strict=True):
        axes.set(title=title, xlabel="token", ylabel="length")
        axes.grid(alpha=0.3)
    for name, curve in curves.items():
        axes = panels[int(name in chunks)]
        (line,) = axes.plot(places, curve, label=name, linewidth=1.3)
        chunk = chunks.get(name, 0)
        if chunk and places[-1] // chunk <= MARKS:
            moves = np.arange(chunk, places[-1] + 1, chunk)
            heights = np.interp(moves, places, curve)
            axes.plot(moves, heights, "|", color=line.get_color(), markersize=8)
    for axes in panels:
        if axes.lines:
            axes.legend(fontsize=8)
            axes.set_ylim(bottom=0)
    about = "Length of each memory over the stream, mean over layers; ticks: moves of a level."
    return Picture("memory-lengths", about, png(figure))


def draw_grids(grids: dict[str, np.ndarray], rows: str, columns: str, about: str) -> Picture | None:
    """Draws matrices of numbers side by side; None where there are none."""
    if not grids:
        return None
    figure = Figure(figsize=(1 + 3.2 * len(grids), 3), layout="constrained")
    for axes, (name, grid) in zip(
        np.atleast_1d(figure.subplots(1, len(grids))), grids.items(), strict=True
    ):
        image = axes.imshow(grid, aspect="auto", vmin=min(0.0, grid.min()), vmax=1.0)
        axes.set(title=name, xlabel=columns, ylabel=rows)
        axes.set_xticks(range(grid.shape[1]))
        axes.set_yticks(range(grid.shape[0]))
        if grid.size <= CELLS:
            for (row, column), value in np.ndenumerate(grid):
                axes.text(column, row, f"{value:.3f}", ha="center", va="center", fontsize=8)
        figure.colorbar(image, ax=axes)
    name = "-".join(grids)
    return Picture(f"memory-{name}", f"{', '.join(grids)} {about}.", png(figure))
