"""What a kernel computes for one chunk of one head whose memories are MLPs: `x + W1 silu(W2 x)`.

Each of the two matrices is a memory as in `chunk`: the hidden one learns at the keys, the other at
what the keys make of the hidden units, each with its own error and its own step. What that takes is
shared with `chunk`, in the same plain operations on two-dimensional values; but where `chunk` is
undone by hand, this is differentiated by `jax.vjp` inside a kernel, in two stages, so that one
memory is in hand at a time: `tell`, what tokens say to all memories, and `study`, what one of them
learns.

Cost for each token of a head with 64 features, 128 hidden units, chunks of 64 and bfloat16:

    k, v, memory, eta, alpha     forward 1.65 MFLOPs, backward 4.0; 2.2 kB of states kept
    memory alone, with momentum  forward 0.31 MFLOPs, backward 0.87; 1.0 kB of states kept

and 0.4 kB of tokens each way: with 16 heads 26 MFLOPs and 42 kB, so that a v5e, which makes 197
TFLOPs of 0.8 TB, is bound by arithmetic. The kernels were compiled for v5e and v5p and simulated,
never run there. They go through Mosaic alone: on a GPU registers do not hold an MLP, see
`gpu.fits`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from hope_jax.ops.pallas import chunk as chunks
from hope_jax.ops.pallas.chunk import (
    Lesson,
    Memories,
    Place,
    Plan,
    Values,
    hidden_of,
    momentum_of,
)


class Told(NamedTuple):
    """What tokens say to all memories.

    Attributes:
      lesson: What does not depend on a layer; its `write` is the gate.
      damping: What momentum leaves of a write, `[C, 1]`; None without.
    """

    lesson: Lesson
    damping: Array | None


def layers(name: str) -> tuple[str, str]:
    """The names of a memory's matrices."""
    return name, hidden_of(name)


def tell(
    plan: Plan, tokens: Values, place: Place | None, memories: Memories, bias: Array | None
) -> Told:
    """Lets tokens project and weighs them.

    Args:
      plan: What to compute.
      tokens: As for `chunk.attend`, in float32.
      place: Where documents lie; None if the plan is not segmented.
      memories: The memories.
      bias: Added to the gates that memories make, `[1, G]`.

    Returns:
      What they say.
    """

    def said(name):
        return tokens[name] if name in tokens else _recall(plan, place, memories, name, tokens["x"])

    key, value, query = said("k"), said("v"), said("q")
    key, query = (
        row * chunks.scale_of(row, gate=False) if name in plan.memories else row
        for name, row in (("k", key), ("q", query))
    )
    logits: list[Array | None] = [None, None]
    for row, name in enumerate(("eta", "alpha")):
        if name in plan.gates:
            logits[row] = chunks.column_of(said(name), 0) + chunks.column_of(bias, row)
    write, _, _, log_retain = chunks.open_gates(plan, tokens, place, logits)
    weights = chunks.weigh(plan, place, memories, log_retain)
    sweep = damping = None
    if plan.momentum:
        beta = tokens["beta"]
        sweep = chunks.sweep_of(plan, place, beta, None, weights.decay, weights.after)
        damping = 1 - beta
    lesson = Lesson(key, None, value, query, None, write, None, None, None, weights, None, sweep)
    return Told(lesson, damping)


def study(
    plan: Plan,
    told: Told,
    place: Place | None,
    memories: Memories,
    name: str,
    leave: Callable[[str, Array], None],
) -> Array | None:
    """Teaches one memory a chunk.

    Args:
      plan: What to compute.
      told: What `tell` returned.
      place: Where documents lie.
      memories: The memories.
      name: Which.
      leave: Called with the name and the matrix after the chunk of each layer and momentum, when
        nothing asks for it any more.

    Returns:
      What was read, of "memory".
    """
    lesson, hidden = told.lesson, hidden_of(name)
    error = _error(plan, lesson, place, memories, name)
    raw = chunks.consult(plan, place, memories, hidden, lesson.key)
    gate = jax.nn.sigmoid(raw)
    slope = gate * (1 + raw * (1 - gate)) * chunks.unconsult(plan, place, memories, name, error)
    read = rows = None
    if name == "memory" and plan.read == "chunk":
        read = _recall(plan, place, memories, name, lesson.query)
    elif name == "memory":
        rows = lesson.query
    for layer, key, wrong in ((hidden, lesson.key, slope), (name, raw * gate, error)):
        lessons = weigh(plan, lesson, key, wrong.shape[1])
        written = lessons.write * wrong
        if told.damping is not None:
            written = told.damping * written
        delta = chunks.absorb(plan, lessons, memories, layer, written)
        if rows is not None:
            rows = chunks.ask(plan, lessons, memories, layer, rows, written, delta)
            rows = jax.nn.silu(rows) if layer == hidden else rows + lesson.query
        state = memories.state(layer)
        after = chunks.advance(plan, lessons, memories, layer, state, written, delta)
        if lessons.sweep is not None:
            momentum = memories.state(momentum_of(layer))
            after += lessons.sweep.gained * momentum
            momentum = chunks.advance_momentum(plan, lessons, momentum, written)
            leave(momentum_of(layer), momentum)
        leave(layer, after)
    return read if rows is None else rows


def weigh(plan: Plan, lesson: Lesson, key: Array, rows: int) -> Lesson:
    """The lesson of a layer with its own keys, whose step is `write / (1 + repeats write |key|^2)`.

    Args:
      plan: What to compute.
      lesson: What tokens say to all layers.
      key: What goes into the layer.
      rows: Of the layer's matrix. Numbers that weigh it are made as tall as it is, since kernels
        sum over one axis at a time.
    """
    length = jnp.sum(key * key, 1, keepdims=True)
    step = lesson.write / (1 + plan.repeats * lesson.write * length)
    inverse = erase = None
    if plan.erases != "nothing":
        erase, inverse = step, chunks.solve(plan, key, step, lesson.weights.decay)

    def tall(number: Array) -> Array:
        return jnp.broadcast_to(number, (rows, 1))

    sweep = lesson.sweep
    if sweep is not None:
        found = None if erase is None else chunks.found_of(plan, key, sweep.spread)
        gained, remains = tall(sweep.gained), tall(sweep.remains)
        sweep = sweep._replace(found=found, gained=gained, remains=remains)
    weights, restore = lesson.weights, lesson.weights.restore
    weights = weights._replace(
        through=tall(weights.through), restore=None if restore is None else tall(restore)
    )
    return lesson._replace(
        key=key, write=step, erase=erase, weights=weights, inverse=inverse, sweep=sweep
    )


def _recall(plan, place, memories, name, rows):
    """Reads a memory as tokens hold it."""
    inner = jax.nn.silu(chunks.consult(plan, place, memories, hidden_of(name), rows))
    y = chunks.consult(plan, place, memories, name, inner)
    return y if name in plan.gates else rows + y


def _error(plan, lesson, place, memories, name):
    """What a memory's inner objective pulls its answers to keys to."""
    target = lesson.value
    if plan.targets == "self":
        target = _recall(plan, place, memories, name, lesson.value)
    if plan.normalize:
        target = target * chunks.scale_of(target, name in plan.gates)
    if plan.objective == "dot":
        return target
    return target - _recall(plan, place, memories, name, lesson.key)
