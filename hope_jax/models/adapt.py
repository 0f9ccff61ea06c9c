"""Models that go on learning: what text of any length taught, to be kept, merged or forgotten."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from hope_jax.models import generate
from hope_jax.models.decoder import BlockMemory, Decoder, Memory
from hope_jax.models.generate import Track
from hope_jax.ops.continuum import LevelMemory, Pace, teach_level
from hope_jax.ops.likelihood import next_token_loss
from hope_jax.shapes import Starts, Tokens

BLOCK = 16
"""Chunks that are learned between two looks of the host."""


class Reading(NamedTuple):
    """What a model with the objective "next_token" carries on.

    Attributes:
      memory: At the beginning of the chunk that is being read.
      hidden: What foretells that chunk's first token.
      tokens: What was read of the chunk.
      starts: Where documents begin in it.
      count: How many tokens that is.
      total: Tokens read in all.
      stored: Chunks to replay, the newest last.
    """

    memory: Memory
    hidden: Float[Array, "B D"]
    tokens: Int[Array, "B C"]
    starts: Bool[Array, "B C"]
    count: Int[Array, ""]
    total: Int[Array, ""]
    stored: Int[Array, "N B C"]


def read(
    model: Decoder,
    tokens: Tokens | np.ndarray,
    memory: Memory | Reading | None = None,
    starts: Starts | np.ndarray | None = None,
    *,
    chunk: int = 128,
    track: Track = iter,
) -> Memory | Reading:
    """Reads text of any length and returns what the model learned and remembers of it.

    Args:
      model: The model that reads.
      tokens: The text; it may stay on the host.
      memory: What earlier text left behind; None for nothing. It can be used again.
      starts: True where a document begins; None where none does.
      chunk: Tokens read at once where the objective is "local"; changes the speed alone.
      track: Passes steps on and may show how many are done.

    Returns:
      The memory to go on with, in `read`, `model(tokens, memory)` and `generate`. Where levels
      learn the next token, it is a `Reading`, which `settle` makes into such a memory.
    """
    if _objective(model) == "local":
        return generate.read(model, tokens, memory, starts, chunk=chunk, track=track)
    return learn(model, tokens, memory, starts, track=track)[1]


def learn(
    model: Decoder,
    tokens: Tokens | np.ndarray,
    reading: Reading | None = None,
    starts: Starts | np.ndarray | None = None,
    *,
    track: Track = iter,
) -> tuple[Float[np.ndarray, "B T"], Reading]:
    """Scores text, and learns each chunk after it was scored.

    The deltas of all layers are held during a chunk of the fastest level. Behind its last token, a
    level's lesson is the gradient of the chunk's loss by that level's deltas, the loss being that
    of the targets that lie in the chunk themselves, each but its first token. A level moves when
    its own chunk ends, by its rate times the mean gradient. A chunk in which a document starts
    teaches nothing to its row.

    With `replay` in the continuum's config the gradient is mixed with that of stored chunks, each
    read with fresh memories and the deltas as they are.

    Args:
      model: A model with the objective "next_token".
      tokens: The text.
      reading: What earlier text left behind; None for nothing.
      starts: True where a document begins.
      track: Passes steps on and may show how many are done.

    Returns:
      The negative log-likelihood of each token in nats, given all before it (0 for the very first
      of a stream), and what to go on with. Any split of a text gives the same numbers.

    Raises:
      ValueError: The model does not learn the next token.
    """
    if _objective(model) != "next_token":
        raise ValueError("objective must be next_token, got local: model(tokens, memory) learns")
    graphdef, params = nnx.split(model, nnx.Param)
    params = nnx.to_pure_dict(params)
    rows, size = tokens.shape[0], _chunk(model)
    reading = fresh(model, rows, reading=True) if reading is None else reading
    count = int(reading.count)
    text = np.concatenate([np.asarray(reading.tokens)[:, :count], np.asarray(tokens)], axis=1)
    begins = np.zeros(text.shape, bool)
    begins[:, :count] = np.asarray(reading.starts)[:, :count]
    if starts is not None:
        begins[:, count:] = np.asarray(starts)
    losses, at = [], 0
    whole = text.shape[1] // size
    steps = [BLOCK] * (whole // BLOCK) + [1] * (whole % BLOCK)
    for step in track(steps):
        cut = [_stack(a[:, at : at + step * size], size) for a in (text, begins)]
        reading, scored = _learn_chunks(graphdef, params, reading, *cut)
        losses.append(scored)
        at += step * size
    left = text.shape[1] - at
    room = ((0, 0), (0, size - left))
    tail, tail_starts = np.pad(text[:, at:], room), np.pad(begins[:, at:], room)
    reading = reading._replace(
        tokens=jnp.asarray(tail, jnp.int32),
        starts=jnp.asarray(tail_starts),
        count=jnp.asarray(left, jnp.int32),
    )
    if left:
        losses.append(_score_tail(graphdef, params, reading)[:, :left])
    scored = np.concatenate([np.asarray(part) for part in losses] or [np.zeros((rows, 0))], axis=1)
    return scored[:, count:], reading


def settle(model: Decoder, memory: Memory | Reading) -> Memory:
    """Returns the memory that the model itself takes: a reading's after its last token.

    What was read of an unfinished chunk is read again, and is not learned from any more.
    """
    if not isinstance(memory, Reading):
        return memory
    count = int(memory.count)
    starts = memory.starts[:, :count]
    return generate.read(
        model, memory.tokens[:, :count], memory.memory, starts, chunk=max(count, 1)
    )


def norms(memory: Memory | Reading) -> dict[int, Float[np.ndarray, "layers B"]]:
    """The length of each learning level's deltas, by layer and sequence."""
    levels = enumerate(_tower(memory).continuum)
    return {index: np.asarray(_norm(level)) for index, level in levels if _learns(level)}


def reset(memory: Memory | Reading, levels: Sequence[int]) -> Memory | Reading:
    """Forgets what some levels learned, and keeps everything else, their place in a chunk too.

    Raises:
      ValueError: A level does not learn in context.
    """

    def empty(level: LevelMemory) -> LevelMemory:
        return level._replace(fast=jax.tree.map(jnp.zeros_like, level.fast))

    return _change(memory, levels, empty)


def consolidate(
    model: Decoder, memory: Memory | Reading, levels: Sequence[int], *, share: float = 1.0
) -> tuple[Decoder, Memory | Reading]:
    """Merges what some levels learned into their slow weights.

        theta <- theta + share mean over sequences of D        D <- (1 - share) D

    One sequence with `share` 1 answers as before; from then on its level forgets towards what it
    learned, and fresh memories begin there.

    Args:
      model: It is left as it is.
      memory: Whose deltas are merged.
      levels: Their places in the continuum.
      share: How much of the deltas.

    Returns:
      A model with the new slow weights, and the memory to go on with.

    Raises:
      ValueError: A level does not learn in context.
    """
    graphdef, params = nnx.split(model, nnx.Param)
    params = nnx.to_pure_dict(params)
    for index in levels:
        fast = _level(memory, index).fast
        own = params["blocks"]["continuum"]["levels"][index]
        merged = [share * jnp.mean(delta, axis=1) for delta in fast.delta]
        own["down"] = own["down"] + merged[-1][:, 0].astype(own["down"].dtype)
        if len(merged) > 1:
            own["up"] = own["up"] + merged[0].astype(own["up"].dtype)
        if len(merged) > 2:
            own["middle"] = own["middle"] + jnp.concatenate(merged[1:-1], axis=1)

    def keep(level: LevelMemory) -> LevelMemory:
        fast = level.fast
        kept = jax.tree.map(lambda a: (1 - share) * a, (fast.delta, fast.initial))
        return level._replace(fast=fast._replace(delta=kept[0], initial=kept[1]))

    return nnx.merge(graphdef, params), _change(memory, levels, keep)


def freeze(model: Decoder, levels: Sequence[int]) -> Decoder:
    """Returns the model with some levels that learn nothing in context any more.

    They answer with their slow weights alone and carry nothing. Levels of a nested continuum carry
    each other: all of them freeze, or none.

    Raises:
      ValueError: There is no such level.
    """
    model = nnx.merge(*nnx.split(model))
    count = len(model.config.continuum.levels)
    if model.config.continuum.variant == "nested" and 0 < len(set(levels)) < count:
        raise ValueError(f"levels must be all {count} or none in a nested continuum, got {levels}")
    for index in levels:
        if not 0 <= index < count:
            raise ValueError(f"levels must lie in [0, {count}), got {index}")
        level = model.blocks.continuum.levels[index]
        level.config = replace(level.config, chunk=None)
    return model


def fresh(model: Decoder, rows: int, *, reading: bool) -> Memory | Reading:
    """What `memory=None` means, as values: a `Reading` or what `model(tokens, memory)` takes."""
    memory = model.initial_memory(rows)
    if not reading:
        return memory
    size = _chunk(model)
    return Reading(
        memory=memory,
        hidden=jnp.zeros((rows, model.config.width), jnp.dtype(model.config.dtype)),
        tokens=jnp.zeros((rows, size), jnp.int32),
        starts=jnp.zeros((rows, size), bool),
        count=jnp.zeros((), jnp.int32),
        total=jnp.zeros((), jnp.int32),
        stored=jnp.zeros((model.config.continuum.replay, rows, size), jnp.int32),
    )


def repeat(memory: Memory, rows: int) -> Memory:
    """Gives the memory of one sequence to `rows` of them.

    Raises:
      ValueError: It is the memory of several sequences, and of another number.
    """

    def spread(leaf: Array) -> Array:
        if leaf.ndim < 2 or leaf.shape[1] == rows:
            return leaf
        if leaf.shape[1] != 1:
            raise ValueError(f"a memory must be of 1 or {rows} sequences, got {leaf.shape[1]}")
        return jnp.repeat(leaf, rows, axis=1)

    return jax.tree.map(spread, memory)


@partial(jax.jit, static_argnames="graphdef")
def _learn_chunks(graphdef, params, reading, tokens, starts):
    """Learns chunks `[N, B, C]`; returns the losses of their tokens."""
    model = nnx.merge(graphdef, params)
    reading, losses = jax.lax.scan(
        lambda reading, chunk: _learn_chunk(model, reading, *chunk), reading, (tokens, starts)
    )
    return reading, jnp.moveaxis(losses, 0, 1).reshape(tokens.shape[1], -1)


def _learn_chunk(model, reading: Reading, tokens, starts):
    """Scores one chunk, then learns it."""
    deltas = _deltas(reading.memory)

    def loss(deltas):
        hidden, memory = model.hidden(tokens, _with_deltas(reading.memory, deltas), starts)
        losses = next_token_loss(hidden[:, :-1], model.unembedding, tokens[:, 1:])
        taught = jnp.where(jnp.any(starts, -1), 0, jnp.sum(losses, -1))
        return jnp.sum(taught), (losses, taught, hidden[:, -1], memory)

    gradient, (losses, taught, hidden, memory) = jax.grad(loss, has_aux=True)(deltas)
    first = _first_loss(model, reading, tokens)
    if model.config.continuum.replay:
        gradient = _mix_replay(model, reading, deltas, gradient)
    targets = jnp.where(jnp.any(starts, -1), 0, tokens.shape[1] - 1).astype(taught.dtype)
    memory = _teach(model, memory, gradient, taught, targets)
    stored = jnp.concatenate([reading.stored, tokens[None]])[1:]
    total = reading.total + tokens.shape[1]
    if not model.config.continuum.replay:
        stored = reading.stored
    reading = reading._replace(memory=memory, hidden=hidden, total=total, stored=stored)
    return reading, jnp.concatenate([first, losses], axis=1)


def _first_loss(model, reading, tokens):
    """The loss of a chunk's first token, which the chunk before foretold."""
    loss = next_token_loss(reading.hidden[:, None], model.unembedding, tokens[:, :1])
    return jnp.where(reading.total > 0, loss, 0)


def _mix_replay(model, reading, deltas, gradient):
    """Mixes a gradient with the mean of those of stored chunks, evenly spread over the store."""
    config, size = model.config.continuum, reading.tokens.shape[1]
    full = jnp.minimum(reading.total // size, config.replay)
    rows = reading.tokens.shape[0]

    def of_stored(deltas, tokens):
        memory = _with_deltas(model.initial_memory(rows), deltas)
        hidden, _ = model.hidden(tokens, memory)
        losses = next_token_loss(hidden[:, :-1], model.unembedding, tokens[:, 1:])
        return jnp.sum(losses)

    def add(total, step):
        place = config.replay - 1 - step * full // config.replay_steps
        slope = jax.grad(of_stored)(deltas, reading.stored[place])
        return jax.tree.map(jnp.add, total, slope), None

    zeros = jax.tree.map(jnp.zeros_like, deltas)
    total, _ = jax.lax.scan(add, zeros, jnp.arange(config.replay_steps))
    ratio = jnp.where(full > 0, config.replay_ratio, 0)
    return jax.tree.map(
        lambda new, old: (1 - ratio) * new + ratio * old / config.replay_steps, gradient, total
    )


def _teach(model, memory, gradient, loss, targets):
    """Hands every level its gradient, in all layers."""
    config = model.config.continuum
    after = []
    levels = zip(config.levels, memory.continuum, gradient, strict=True)
    for settings, level, slope in levels:
        if slope is not None:
            momentum = jnp.asarray(settings.momentum) if settings.momentum else None
            pace = Pace(jnp.asarray(settings.rate), jnp.asarray(settings.retain), momentum)
            teach = partial(teach_level, chunk=settings.chunk, surprise=config.surprise)
            level = jax.vmap(lambda m, g, p=pace, f=teach: f(m, g, loss, targets, p))(level, slope)
        after.append(level)
    return memory._replace(continuum=tuple(after))


@partial(jax.jit, static_argnames="graphdef")
def _score_tail(graphdef, params, reading):
    """The losses of a chunk that is not whole yet; those of its padding mean nothing."""
    model = nnx.merge(graphdef, params)
    hidden, _ = model.hidden(reading.tokens, reading.memory, reading.starts)
    losses = next_token_loss(hidden[:, :-1], model.unembedding, reading.tokens[:, 1:])
    return jnp.concatenate([_first_loss(model, reading, reading.tokens), losses], axis=1)


def _deltas(memory: BlockMemory):
    return [level.fast.delta if _learns(level) else None for level in memory.continuum]


def _with_deltas(memory: BlockMemory, deltas) -> BlockMemory:
    levels = zip(memory.continuum, deltas, strict=True)
    return memory._replace(
        continuum=tuple(
            level if delta is None else level._replace(fast=level.fast._replace(delta=delta))
            for level, delta in levels
        )
    )


@jax.jit
def _norm(level: LevelMemory) -> Float[Array, "layers B"]:
    squares = [jnp.sum(delta**2, axis=range(2, delta.ndim)) for delta in level.fast.delta]
    return jnp.sqrt(sum(squares))


def _tower(memory: Memory | Reading) -> BlockMemory:
    return memory.memory if isinstance(memory, Reading) else memory


def _learns(level: object) -> bool:
    return isinstance(level, LevelMemory)


def _level(memory: Memory | Reading, index: int) -> LevelMemory:
    levels = _tower(memory).continuum
    there = [place for place, level in enumerate(levels) if _learns(level)]
    if index not in there:
        raise ValueError(f"levels must be among those that learn in context, {there}, got {index}")
    return levels[index]


def _change(memory, levels, change):
    """Applies a function to the memories of some levels."""
    tower = _tower(memory)
    changed = {index: change(_level(memory, index)) for index in levels}
    continuum = tuple(changed.get(i, level) for i, level in enumerate(tower.continuum))
    tower = tower._replace(continuum=continuum)
    return memory._replace(memory=tower) if isinstance(memory, Reading) else tower


def _objective(model: Decoder) -> str:
    config = model.config.continuum
    return config.objective if config.learns() else "local"


def _chunk(model: Decoder) -> int:
    return min(level.chunk for level in model.config.continuum.levels if level.chunk is not None)


def _stack(array: np.ndarray, size: int) -> np.ndarray:
    """Cuts `[B, N C]` into `[N, B, C]`."""
    return np.moveaxis(array.reshape(len(array), -1, size), 1, 0)
