"""Takes one chunk through each kernel: from what lies in memory to what `chunk` computes, and back.

The kernels of all machines are these. What a machine adds is how a sequence is cut into programs
and how a program sees its part (`View`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from hope_jax.ops.pallas import chunk as chunks
from hope_jax.ops.pallas.chunk import GATE_ROWS, Ledger, Memories, Place, Plan, Values


class Sequence(NamedTuple):
    """What a kernel reads; any of it None if the plan does without.

    Attributes:
      tokens: By name, `[B, T, H, K]`, gates `[B, T, H]` in float32; T a multiple of the chunk.
      segments: The number of document starts in a token's chunk up to the token; -1 for padding.
      last: The number of the last token of a chunk that is not padding; -1 if there is none.
      final: The last chunk that is not all padding, if one of them may be.
      states: The states before the first token, `[B, H, V, K]` in float32.
      held: What the tokens of the first chunk project with, if they are not the first.
      origins: Where the states return to, `[H, V, K]`, as operands.
      bias: Of the gates, `[H, 1, GATE_ROWS]`.
    """

    tokens: Values
    segments: Int[Array, "B T"] | None
    last: Int[Array, "B N"] | None
    final: Int[Array, "1"] | None
    states: Values
    held: Values | None
    origins: Values | None
    bias: Float[Array, "H 1 G"] | None


class View(NamedTuple):
    """How a program sees memory.

    Attributes:
      rows: The index of a chunk's tokens, given the number of the chunk.
      item: The index of what is kept for a chunk.
      last: Reads `Sequence.last` of a chunk.
      fence: Lets all threads of a program see what was written before any goes on.
    """

    rows: Callable[[Any], Any]
    item: Callable[[Any], Any]
    last: Callable[[Any, Any], Any]
    fence: Callable[[], None]


def shapes_of_notes(
    plan: Plan,
    place: tuple[int, int, int],
    keys: int,
    values: int,
    column: tuple[int, ...],
    restores: bool,
) -> dict[str, jax.ShapeDtypeStruct]:
    """What `prepare` fills, by name: `[B, H, N, ...]`.

    Args:
      plan: What is computed.
      place: B, H, N.
      keys: Features of keys.
      values: Features of values.
      column: The shape of one number for each token of a chunk.
      restores: See `chunk.notes`.
    """
    shapes = {
        "key": (plan.chunk, keys),
        "value": (plan.chunk, values),
        "gates": (plan.chunk, GATE_ROWS),
        "state": (values, keys),
        "column": column,
        "number": (1, 1),
    }
    wide = ("column", "number", "gates")
    return {
        name: jax.ShapeDtypeStruct(
            (*place, *shapes[kind]), jnp.float32 if kind in wide else plan.operand
        )
        for name, kind in chunks.notes(plan, restores).items()
    }


def shapes_of_shelf(plan: Plan, values: int) -> dict[str, tuple[int, int]]:
    """What `backward` puts aside while it goes through a chunk."""
    shapes = {}
    for name in plan.names:
        shape = plan.chunk, GATE_ROWS if name == "gates" else values
        shapes |= {"owed_" + name: shape, "dtarget_" + name: shape}
    return shapes


def begin_forward(plan, view, sequence, ends, ends_held):
    """Lays the states where `forward` finds them."""
    for name in plan.names:
        ends[name][...] = sequence.states[name][...]
        if plan.holds:
            ends_held[name][...] = sequence.held[name][...]
    view.fence()


def forward(plan, view, sequence, n, y, ends, ends_held, starts):
    """Reads chunk n; `starts` takes the states at its start unless it is None."""
    place, tokens = _place(plan, view, sequence, n), _tokens(view, sequence, n)
    memories = _memories(plan, sequence, lambda name: ends[name][...], n)
    bias = None if sequence.bias is None else sequence.bias[...]
    for name in plan.names if starts is not None else ():
        starts[name][view.item(n)] = ends[name][...].astype(plan.operand)
    if plan.holds:
        _hold(plan, view, sequence, n, place, memories, ends, ends_held)
    lesson = chunks.attend(plan, tokens, place, memories, bias)
    for name in plan.names:
        _, _, delta = chunks.teach(plan, lesson, place, memories, name)
        if name == "memory":
            part = chunks.read(plan, lesson, place, memories, delta)
            y[view.rows(n)] = part.astype(y.dtype)
        after = chunks.advance(plan, lesson, memories, name, ends[name][...], delta)
        _put(view, ends[name], after)


def prepare(plan, view, sequence, starts, dy, n, notes):
    """Takes notes of chunk n."""
    place, tokens = _place(plan, view, sequence, n), _tokens(view, sequence, n)
    memories = _memories(plan, sequence, lambda name: starts[name][view.item(n)], n)
    bias = None if sequence.bias is None else sequence.bias[...]

    def note(name, value):
        given = name == "dquery" and "q" not in plan.memories
        index = view.rows(n) if given else view.item(n)
        ref = notes[name]
        ref[index] = value.reshape(ref.at[index].shape).astype(ref.dtype)

    lesson = chunks.attend(plan, tokens, place, memories, bias)
    grad = dy[view.rows(n)]
    if place is not None:
        grad = jnp.where(place.live, grad, 0)
    chunks.prepare(plan, lesson, place, memories, grad, note)


def begin_backward(plan, view, dends, dstates, dorigins, dbias):
    """Lays the gradients of the last states where `backward` finds them, and zero for sums."""
    for name in plan.names:
        dstates[name][...] = dends[name][...]
        if dorigins is not None:
            dorigins[name][...] = jnp.zeros(dorigins[name].shape, jnp.float32)
    if plan.gates:
        dbias[...] = jnp.zeros(dbias.shape, jnp.float32)
    view.fence()


def backward(
    plan, view, sequence, notes, starts, dy, dends_held, n,
    dtokens, dstates, dheld, dorigins, dbias, shelf,
):  # fmt: skip
    """Hands gradients back through chunk n."""
    place = _place(plan, view, sequence, n)

    def before(name, state, held):
        held = 0 if held is None else held
        if plan.holds and place is not None:
            ending = jnp.where(n == sequence.final[0], dends_held[name][...], 0)
            if dorigins is not None and not plan.anchor:
                origin(name, jnp.where(place.last > 0, ending, 0))
            held += jnp.where(place.last > 0, 0, ending)
            _put(view, dheld[name], jnp.where(n == 0, held, 0))
            held = jnp.where(n == 0, 0, held)
        _put(view, dstates[name], state + held)

    def origin(name, change):
        _put(view, dorigins[name], dorigins[name][...] + change)

    ledger = Ledger(
        lambda name: dstates[name][...],
        before,
        None if dorigins is None else origin,
        lambda name, rows: _put(view, shelf[name], rows),
        lambda name: shelf[name][...],
    )
    bias = unlearn(plan, view, sequence, notes, starts, dy, n, ledger, dtokens)
    if plan.gates:
        _put(view, dbias, dbias[...] + bias)


def unlearn(plan, view, sequence, notes, starts, dy, n, ledger, dtokens):
    """Hands gradients back through chunk n; returns that of the bias, if there is one."""
    rows = view.rows(n)
    place, tokens = _place(plan, view, sequence, n), _tokens(view, sequence, n)
    memories = _memories(plan, sequence, lambda name: starts[name][view.item(n)], n)
    grad = None
    if plan.read == "chunk":
        grad = dy[rows] if place is None else jnp.where(place.live, dy[rows], 0)
    noted = Noted(notes, view.item(n))
    slopes = chunks.unlearn(plan, tokens, noted, place, memories, ledger, grad)
    for name, ref in dtokens.items():
        ref[rows] = slopes[name].reshape(ref.at[rows].shape).astype(ref.dtype)
    return slopes.get("bias")


class Noted(dict):
    """Notes of a chunk by name, loaded when they are asked for."""

    def __init__(self, refs, item):
        super().__init__(refs)
        self.item = item

    def __getitem__(self, name):
        return _column(super().__getitem__(name)[self.item])


def read_by_origin(plan, sequence, notes, weight, dy, dorigins):
    """Adds to the gradients of origins what the reads owe them."""
    if dorigins is None or plan.read == "chunk" or not (plan.anchor or "inherit" in notes):
        return dorigins
    query = _as_tokens(notes["query"]) if "query" in notes else sequence.tokens["q"]
    weighed = dy if plan.anchor else dy * _as_tokens(weight)
    read = jnp.einsum("BTHV,BTHK->BHVK", weighed, query, preferred_element_type=jnp.float32)
    return dorigins | {"memory": dorigins["memory"] + read}


def _as_tokens(notes):
    """`[B, H, N, C, ...]` as `[B, T, H, ...]`; a column gets an axis of one feature."""
    notes = notes if notes.ndim == 5 else notes[..., None]
    batch, heads, count, size, width = notes.shape
    return jnp.swapaxes(notes.reshape(batch, heads, count * size, width), 1, 2)


def _hold(plan, view, sequence, n, place, memories, ends, ends_held):
    """Keeps what the tokens of a chunk project with, for the one in which the sequence ends."""
    for name in plan.names:
        held = jnp.where(n == 0, sequence.held[name][...], ends[name][...])
        fresh = 0 if plan.anchor else memories.origin(name).astype(jnp.float32)
        held = jnp.where(place.last > 0, fresh, held)
        final = n == sequence.final[0]
        _put(view, ends_held[name], jnp.where(final, held, ends_held[name][...]))


def _tokens(view, sequence, n):
    """A chunk's tokens; gates as columns."""
    return {name: _column(ref[view.rows(n)]) for name, ref in sequence.tokens.items()}


def _column(value):
    return value if value.ndim == 2 else value[:, None]


def _place(plan, view, sequence, n):
    if not plan.segmented:
        return None
    number = _column(sequence.segments[view.rows(n)])
    return Place(number, view.last(sequence.last, n))


def _memories(plan, sequence, state, n):
    """Reads matrices as operands; `state` reads those at the start of chunk n."""

    def held(name):
        matrix = state(name)
        if plan.holds:
            matrix = jnp.where(n == 0, sequence.held[name][...].astype(matrix.dtype), matrix)
        if plan.anchor:
            matrix = matrix.astype(jnp.float32) + origin(name).astype(jnp.float32)
        return matrix.astype(plan.operand)

    def origin(name):
        return sequence.origins[name][...]

    return Memories(
        lambda name: state(name).astype(plan.operand),
        held,
        None if sequence.origins is None else origin,
    )


def _put(view, ref, value):
    view.fence()
    ref[...] = value.astype(ref.dtype)
    view.fence()
