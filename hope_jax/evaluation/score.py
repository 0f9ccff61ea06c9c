"""How well a model foretells a stream: each target once, with memory carried on or fresh."""

import math
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from hope_jax.data.packing import Stream, weigh
from hope_jax.models.decoder import Decoder, Memory
from hope_jax.models.generate import Track
from hope_jax.ops.likelihood import next_token_loss
from hope_jax.shapes import Batch
from hope_jax.sharding import RULES, named

Row = range
"""The stream positions that one row of a batch reads; it foretells the position after each."""


def score(
    model: Decoder, batch: Batch, memory: Memory | None = None
) -> tuple[Float[Array, "B T"], Memory]:
    """Scores what a model says about the next tokens, by the function that training descends.

    Args:
      model: The model.
      batch: What it reads; it has no weights.
      memory: What earlier text left behind; its buffers are given away. None is fresh memory.

    Returns:
      The negative log-likelihood of `batch.tokens[:, 1:]` in nats, and the memory to go on with.
    """
    graphdef, params = nnx.split(model, nnx.Param)
    return _score(graphdef, nnx.to_pure_dict(params), batch, memory)


@partial(jax.jit, static_argnames="graphdef", donate_argnames="memory")
def _score(graphdef: nnx.GraphDef, params: dict, batch: Batch, memory: Memory | None):
    model = nnx.merge(graphdef, params)
    inputs, starts, targets = batch.shifted()
    hidden, memory = model.hidden(inputs, memory, starts)
    return next_token_loss(hidden, model.unembedding, targets), memory


class Total(NamedTuple):
    """What a stream costs.

    Attributes:
      nats: Weighted sum of the negative log-likelihoods.
      targets: Sum of the weights; the number of targets where all count alike.
    """

    nats: float
    targets: float


def total(
    model: Decoder,
    stream: Stream,
    plan: Sequence[Sequence[Row]],
    *,
    carry: bool,
    isolate: bool = True,
    memory: Memory | None = None,
    track: Track = iter,
) -> Total:
    """Scores the rows of a plan; the host looks one batch behind, so that no device waits.

    Args:
      model: The model.
      stream: What the plan cuts.
      plan: For each batch its rows; see `windows` and `lanes`.
      carry: Whether a row goes on with the memory of the same row of the batch before.
      isolate: Whether a document begins with fresh memory inside a row.
      memory: What the first batch begins with, and every batch without `carry`; None is fresh.
      track: Passes the batches on.
    """
    before, sums = memory, Total(0.0, 0.0)
    memory = jax.tree.map(jnp.copy, before)
    width = max(len(row) for rows in plan for row in rows)
    pending = None
    for rows in track(plan):
        tokens, starts, weights = place(read(stream, rows, width=width, isolate=isolate))
        if not carry:
            memory = jax.tree.map(jnp.copy, before)
        losses, memory = score(model, Batch(tokens, starts), memory)
        if pending is not None:
            sums = _add(sums, pending)
        pending = jnp.sum(losses * weights), jnp.sum(weights)
    return sums if pending is None else _add(sums, pending)


def windows(tokens: int, *, window: int, rows: int) -> list[list[Row]]:
    """Cuts a stream into windows that share no target; the last may be short.

    Args:
      tokens: In the stream.
      window: Positions that a row reads.
      rows: In each batch; empty ones fill up the last.
    """
    starts = range(0, tokens - 1, window)
    cut = [range(start, min(start + window, tokens - 1)) for start in starts]
    cut += [range(0)] * (-len(cut) % rows)
    return [cut[i : i + rows] for i in range(0, len(cut), rows)]


def lanes(stream: Stream, *, window: int, rows: int) -> list[list[Row]]:
    """Cuts a stream into at most `rows` lanes that are read side by side, window after window.

    A lane begins where a document does. If documents begin with fresh memory, a lane has nothing
    to know from the one before; only the place of a chunk's edge in a document, for models with
    chunks, depends on where its lane begins.

    Args:
      stream: What is cut.
      window: Positions that a row reads at once.
      rows: The most lanes; fewer where too few documents begin at a fitting place.
    """
    last = stream.info.tokens - 1
    ideal = [last * lane // rows for lane in range(1, rows)]
    edges = sorted({0, last, *(_next_start(stream, place) for place in ideal)})
    pairs = list(pairwise(edges))
    pairs += [(0, 0)] * (rows - len(pairs))
    steps = -(-max(end - start for start, end in pairs) // window)
    return [
        [
            range(min(start + step * window, end), min(start + (step + 1) * window, end))
            for start, end in pairs
        ]
        for step in range(steps)
    ]


def whole_rows(rows: int) -> int:
    """Returns how many rows, at least as many, the devices of the mesh in use share evenly."""
    mesh = jax.sharding.get_mesh()
    pieces = math.prod(mesh.shape.get(axis, 1) for axis in RULES["batch"])
    return -(-rows // pieces) * pieces


def read(stream: Stream, rows: Sequence[Row], *, width: int, isolate: bool) -> tuple:
    """Reads a batch; what a row lacks of `width` counts nothing.

    Returns:
      The tokens, starts and weights of a `Batch`, on the host.
    """
    tokens = np.zeros((len(rows), width + 1), np.int32)
    starts = np.zeros((len(rows), width + 1), bool)
    weights = np.zeros((len(rows), width), np.float32)
    for i, row in enumerate(rows):
        if len(row):
            piece = stream.read(row.start, row.stop + 1)
            tokens[i, : len(row) + 1] = piece.tokens
            starts[i, : len(row) + 1] = piece.starts & isolate
            weights[i, : len(row)] = weigh(piece)[1:]
    return tokens, starts, weights


def place(arrays: tuple) -> tuple:
    """Lays the rows of arrays over the mesh in use."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.tree.map(jnp.asarray, arrays)
    return jax.tree.map(lambda x: jax.device_put(x, named(("batch", None), x.shape, mesh)), arrays)


def _add(sums: Total, pending: tuple[Array, Array]) -> Total:
    return Total(*(one + float(other) for one, other in zip(sums, pending, strict=True)))


def _next_start(stream: Stream, position: int, step: int = 1 << 16) -> int:
    """The first document start at or after a position, or the last target's place."""
    last = stream.info.tokens - 1
    for start in range(position, last, step):
        found = np.flatnonzero(stream.read(start, min(start + step, last)).starts)
        if len(found):
            return start + int(found[0])
    return last
