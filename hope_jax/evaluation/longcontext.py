"""How well a model reads on and on: perplexity by position in one stream of any length."""

import json
import math
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from hope_jax.data.packing import Piece, Stream, weigh
from hope_jax.evaluation.answers import digest
from hope_jax.evaluation.memory import lengths
from hope_jax.evaluation.page import Picture, png, write_page
from hope_jax.evaluation.perplexity import Document
from hope_jax.evaluation.score import place, score, whole_rows
from hope_jax.evaluation.subject import Results, Subject, TaskError
from hope_jax.models.adapt import Reading, freeze, learn
from hope_jax.models.decoder import Decoder, Memory
from hope_jax.models.memory_file import load_memory, save_memory
from hope_jax.shapes import Batch

UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
EARLY = 100_000
"""Tokens after which device memory is looked at for the first time."""

COMPILED = 2
"""Segments that may compile: one that is what is left over, and one of the usual size."""


@dataclass(frozen=True, kw_only=True)
class LongContext:
    """Reads one long stream with one memory, and tells how well by how far it has read.

    Documents follow one another and are not forgotten where they end. Each token is foretold once,
    before anything is learned from it. Attention sees as far back as its window. What was done is
    kept beside the report every `keep` tokens, and the same command goes on from there.

    Attributes:
      length: Tokens to read, as 16384, "100k" or "10M".
      split: Which part of the run's data, where no file is given.
      file: A UTF-8 text to read instead.
      repeat: Whether a text that is shorter begins again; what is known by heart is then foretold
        well, so that only speed and memory mean something.
      learn: Whether levels with the objective "next_token" learn from each chunk once it is scored.
      levels: How many of the levels that learn in context do so, the fastest of them: 0 turns the
        in-context clock off. None leaves the model as it is.
      segment: Tokens that go to the device at once.
      points: How often memories are measured on the way.
      keep: Tokens between two looks from which it can go on.
    """

    length: int | str = "100k"
    split: Literal["train", "valid", "test"] = "valid"
    file: str | None = None
    repeat: bool = False
    learn: bool = False
    levels: int | None = None
    segment: int = 8192
    points: int = 64
    keep: int = 1_000_000

    def __post_init__(self):
        for name in ("segment", "points", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.tokens < 1:
            raise ValueError(f"length must be at least 1, got {self.length}")
        if self.levels is not None and self.levels < self.learn:
            raise ValueError(f"levels must be at least {int(self.learn)}, got {self.levels}")

    @property
    def tokens(self) -> int:
        """The length as a number."""
        if isinstance(self.length, int):
            return self.length
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([kMG]?)", self.length)
        if found is None:
            raise ValueError(f"length must be a number with k, M, G or nothing, got {self.length}")
        return round(float(found[1]) * UNITS[found[2]])

    def run(self, subject: Subject) -> Results:
        """Reads; returns numbers over all, speed, device memory where it can be told, a page."""
        subject = subject._replace(model=self._wind(subject.model))
        stream, name = self._stream(subject)
        there = stream.info.tokens - 1
        if there < 1:
            raise TaskError(f"a text must hold at least 1 token to foretell, {name} holds 0")
        if there < self.tokens and not self.repeat:
            raise TaskError(
                f"length must be at most {there} for {name}, got {self.tokens}: name a longer "
                "file, or set repeat=true to measure speed and memory alone"
            )
        settings = {key: value for key, value in asdict(self).items() if key != "keep"}
        kept = subject.folder / f"longcontext-{digest(subject.model, settings)}"
        state, memory = _go_on(kept, subject.model)
        marks, saved = [], state.position
        for now in self._read(subject, stream, state, memory):
            state, memory = now
            marks.append((time.perf_counter(), state.position))
            if state.position // self.keep > saved // self.keep:
                _keep(kept, subject.model, state, memory)
                saved = state.position
        found = self._results(subject, state)
        if len(marks) > COMPILED:
            (start, first), (end, last) = marks[COMPILED - 1], marks[-1]
            found["tokens_per_second"] = (last - first) / (end - start)
        found["plain_tokens_per_second"] = _plain_rate(subject, stream, self.tokens)
        pictures = [_draw_cost(state), _draw_norms(state)]
        about = f"{name}, {self.tokens:,} tokens read as one stream."
        page = write_page(subject.folder, "longcontext", about, pictures, found)
        shutil.rmtree(kept, ignore_errors=True)
        return found | {"page": str(page)}

    def _wind(self, model: Decoder) -> Decoder:
        """The model with the wanted levels alone on the in-context clock."""
        chunks = [level.chunk for level in model.config.continuum.levels]
        learning = [i for _, i in sorted((c, i) for i, c in enumerate(chunks) if c is not None)]
        if self.levels is None or self.levels == len(learning):
            return model
        if self.levels > len(learning):
            raise TaskError(
                f"levels must be at most {len(learning)}, those that learn in context, "
                f"got {self.levels}"
            )
        try:
            return freeze(model, learning[self.levels :])
        except ValueError as error:
            raise TaskError(str(error)) from error

    def _stream(self, subject: Subject) -> tuple[Stream, str]:
        if self.file is not None:
            return Document(Path(self.file), subject.tokenizer), self.file
        return subject.stream(self.split), f"split {self.split!r}"

    def _read(
        self, subject: Subject, stream: Stream, state: "State", memory: Any
    ) -> Iterator[tuple["State", Any]]:
        """Yields what is known after each segment."""
        stride = -(-self.tokens // self.points)
        ends = range((self.tokens - 1) % self.segment + 1, self.tokens + 1, self.segment)
        for stop in subject.track([end for end in ends if end > state.position]):
            start = state.position
            piece = around(stream, start, stop + 1)
            try:
                losses, memory = _advance(piece, memory, subject.model, learns=self.learn)
            except ValueError as error:
                raise TaskError(str(error)) from error
            state = state.add(losses, weigh(piece)[1:])
            if start // stride != stop // stride or stop == self.tokens:
                state = state.look(memory)
            if start < EARLY <= stop:
                state = state._replace(early=_peak())
            yield state, memory

    def _results(self, subject: Subject, state: "State") -> Results:
        found: Results = {"tokens": state.position}
        nats = state.nats.sum() / state.targets.sum()
        found |= {"nats_per_token": float(nats), "perplexity": float(np.exp(min(nats, 700.0)))}
        for place_, cost, count in zip(state.places, state.nats, state.targets, strict=True):
            if count:
                low, high = 2**place_, 2 ** (place_ + 1) - 1
                found[f"perplexity_{low}_to_{high}"] = float(np.exp(min(cost / count, 700.0)))
        for name, values in state.norms.items():
            found[f"{name}_length"] = float(values[-1])
        found["memory_bytes"] = state.bytes
        peak = _peak()
        if peak is not None:
            found["peak_bytes"] = peak
            if state.early is not None:
                found[f"peak_bytes_at_{EARLY}"] = state.early
        found["window_of_training"] = subject.window
        return found


class State(NamedTuple):
    """What is known of a stream so far; targets are sorted by the power of two below their place.

    Attributes:
      position: Targets foretold.
      nats: What they cost, by power of two.
      targets: How many, by power of two.
      looks: Positions at which memories were measured.
      norms: The length of each memory there.
      bytes: What the model carries on.
      early: The most bytes of the device in use until `EARLY` tokens; None where it does not say.
    """

    position: int = 0
    nats: Float[np.ndarray, " N"] = np.zeros(64)
    targets: Float[np.ndarray, " N"] = np.zeros(64)
    looks: tuple[int, ...] = ()
    norms: dict[str, list[float]] = {}  # noqa: RUF012 (never changed in place)
    bytes: int = 0
    early: int | None = None

    @property
    def places(self) -> range:
        """The powers of two."""
        return range(len(self.nats))

    def add(self, losses: Float[np.ndarray, " T"], weights: Float[np.ndarray, " T"]) -> "State":
        """Counts the next targets."""
        start = self.position
        powers = np.frexp(np.arange(start, start + len(losses)) + 1)[1] - 1
        size = len(self.nats)
        return self._replace(
            position=start + len(losses),
            nats=self.nats + np.bincount(powers, losses * weights, size),
            targets=self.targets + np.bincount(powers, weights, size),
        )

    def look(self, memory: Memory | Reading) -> "State":
        """Measures memories."""
        found = lengths(memory)
        norms = {name: [*self.norms.get(name, []), value] for name, value in found.items()}
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(memory))
        return self._replace(looks=(*self.looks, self.position), norms=norms, bytes=size)


def around(stream: Stream, start: int, stop: int) -> Piece:
    """Reads places of a stream that begins again where it ends."""
    size = stream.info.tokens
    parts = []
    while start < stop:
        begin = start % size
        end = min(size, begin + stop - start)
        parts.append(stream.read(begin, end))
        start += end - begin
    weights = np.concatenate([weigh(part) for part in parts])
    return Piece(
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.starts for part in parts]),
        weights,
    )


def _advance(
    piece: Piece, memory: Any, model: Decoder, *, learns: bool
) -> tuple[Float[np.ndarray, " T"], Any]:
    """Foretells all of a piece but its first token."""
    if learns:
        # Here a token is scored when it is read, and the very first of a stream is read before.
        tokens = piece.tokens[None] if memory is None else piece.tokens[None, 1:]
        losses, memory = learn(model, tokens, memory)
        return losses[0, 1 - len(piece.tokens) :], memory
    tokens = np.zeros((whole_rows(1), len(piece.tokens)), np.int32)
    tokens[0] = piece.tokens
    losses, memory = score(model, Batch(*place((tokens, np.zeros(tokens.shape, bool)))), memory)
    return np.asarray(losses[0], np.float64), memory


def _plain_rate(subject: Subject, stream: Stream, most: int, rounds: int = 3) -> float:
    """Tokens a second of the same function on one sequence of at most 16384 with fresh memory."""
    size = min(16384, most)
    tokens = np.tile(around(stream, 0, size + 1).tokens, (whole_rows(1), 1)).astype(np.int32)
    batch = Batch(*place((tokens, np.zeros(tokens.shape, bool))))
    jax.block_until_ready(score(subject.model, batch))
    start = time.perf_counter()
    for _ in range(rounds):
        jax.block_until_ready(score(subject.model, batch))
    return rounds * size / (time.perf_counter() - start)


def _peak() -> int | None:
    """The most bytes of a device that were in use at once, of all devices."""
    known = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.devices()]
    return max((size for size in known if size is not None), default=None)


def _keep(folder: Path, model: Decoder, state: State, memory: Any):
    """Writes what to go on from; the name of the memory's file says to which state it belongs."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{state.position}.safetensors"
    save_memory(file, model, memory)
    content = state._asdict() | {"nats": state.nats.tolist(), "targets": state.targets.tolist()}
    draft = folder / "state.part"
    draft.write_text(json.dumps(content), "utf-8")
    draft.replace(folder / "state.json")
    for other in folder.glob("*.safetensors"):
        if other != file:
            other.unlink()


def _go_on(folder: Path, model: Decoder) -> tuple[State, Any]:
    """Reads what was kept, or begins."""
    if not (folder / "state.json").exists():
        return State(), None
    content = json.loads((folder / "state.json").read_text("utf-8"))
    for name in ("nats", "targets"):
        content[name] = np.array(content[name])
    state = State(**content | {"looks": tuple(content["looks"])})
    try:
        memory = load_memory(folder / f"{state.position}.safetensors", model)
    except ValueError as error:
        raise TaskError(f"{error}; remove {folder} to begin anew") from error
    return state, jax.tree.map(jnp.asarray, memory)


def _draw_cost(state: State) -> Picture:
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    there = state.targets > 0
    places = 2.0 ** np.arange(len(there))[there]
    costs = np.exp(np.minimum(state.nats[there] / state.targets[there], 700.0))
    axes.plot(places * math.sqrt(2), costs, marker="o")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens read before", ylabel="perplexity")
    axes.grid(alpha=0.3)
    about = "Perplexity of the tokens between one power of two and the next."
    return Picture("longcontext-perplexity", about, png(figure))


def _draw_norms(state: State) -> Picture:
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, values in state.norms.items():
        axes.plot(state.looks, values, label=name)
    axes.set(xlabel="token", ylabel="length")
    axes.set_yscale("symlog", linthresh=1e-3)
    axes.grid(alpha=0.3)
    if state.norms:
        figure.legend(loc="outside right upper", fontsize=8)
    about = "Length of each memory over the stream, mean over layers."
    return Picture("longcontext-memories", about, png(figure))
