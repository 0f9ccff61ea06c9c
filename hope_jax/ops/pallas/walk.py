"""Takes one chunk through each kernel: from what lies in memory to what `chunk` computes, and back.

The kernels of all machines are these. What a machine adds is how a sequence is cut into programs
and how a program sees its part (`View`).
"""

from collections.abc import Callable, Mapping
from operator import add
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from hope_jax.ops.pallas import chunk as chunks
from hope_jax.ops.pallas import deep
from hope_jax.ops.pallas.chunk import (
    GATE_ROWS,
    Change,
    Erased,
    Lesson,
    Memories,
    Place,
    Plan,
    Share,
    Swept,
    Values,
    momentum_of,
)


class Sequence(NamedTuple):
    """What a kernel reads; any of it None if the plan does without.

    Attributes:
      tokens: By name, `[B, T, H, K]`, gates `[B, T, H]` in float32; T a multiple of the chunk.
      segments: The number of document starts in a token's chunk up to the token; -1 for padding.
      last: The number of the last token of a chunk that is not padding; -1 if there is none.
      early: The number of document starts in earlier chunks of the group.
      live: The first and the last chunk that are not all padding, if the plan holds.
      states: The states before the first token, `[B, H, V, K]` in float32, and the momenta.
      held: What the first tokens project with, if they are not the first of their group.
      origins: Where the states return to, `[H, V, K]`, as operands.
      bias: Of the gates, `[H, 1, GATE_ROWS]`.
    """

    tokens: Values
    segments: Int[Array, "B T"] | None
    last: Int[Array, "B N"] | None
    early: Int[Array, "B N"] | None
    live: Int[Array, "2"] | None
    states: Values
    held: Values | None
    origins: Values | None
    bias: Float[Array, "H 1 G"] | None


class View(NamedTuple):
    """How a program sees memory.

    Attributes:
      rows: The index of a chunk's tokens, given the number of the chunk.
      item: The index of what is kept for a chunk.
      number: Reads `Sequence.last` or `Sequence.early` of a chunk.
      fence: Lets all threads of a program see what was written before any goes on.
    """

    rows: Callable[[Any], Any]
    item: Callable[[Any], Any]
    number: Callable[[Any, Any], Any]
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
        "pairs": (plan.chunk, plan.chunk),
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


def shapes_of_slopes(plan: Plan, keys: int, values: int) -> dict[str, jax.ShapeDtypeStruct]:
    """What `chunk.charge` returns of a chunk, by name; columns as vectors."""
    wide = {"k": keys, "v": values}
    shapes = {n: jax.ShapeDtypeStruct((plan.chunk, w), plan.operand) for n, w in wide.items()}
    if plan.gates:
        shapes["gates"] = jax.ShapeDtypeStruct((plan.chunk, GATE_ROWS), jnp.float32)
    column = jax.ShapeDtypeStruct((plan.chunk,), jnp.float32)
    given = tuple(name for name in ("eta", "alpha") if name not in plan.gates)
    return shapes | dict.fromkeys(given + (("beta",) if plan.momentum else ()), column)


def shapes_of_share(plan: Plan, keys: int, values: int) -> Share:
    """What `chunk.unlearn` returns as a share of a chunk, shapes for arrays; columns as vectors."""

    def rows(*widths, dtype=jnp.float32) -> Any:
        return jax.ShapeDtypeStruct((plan.chunk, *widths), dtype)

    def tile(width):
        return rows(width, dtype=plan.operand)

    number: Any = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    erased = met = pairs = swept = None
    if plan.erases != "nothing":
        erased = Erased(rows(), rows(), tile(plan.chunk))
        met, pairs = rows(), tile(plan.chunk)
    if plan.momentum:
        swept = Swept(rows(), rows(), rows(), number, rows(), number, met, pairs)
    return Share(tile(keys), tile(values), rows(), rows(), rows(), number, erased, swept)


class Page(NamedTuple):
    """What a program sees of a chunk.

    Attributes:
      tokens: As for `chunk.attend`.
      notes: What was noted of the chunk.
      place: Where documents lie.
      memories: The memories.
    """

    tokens: Values
    notes: Mapping[str, Array]
    place: Place | None
    memories: Memories


def look(plan, view, sequence, n, state, held, notes=None) -> Page:
    """Opens chunk n; matrices and notes are read where they are used, since registers are few.

    Args:
      plan: What is computed.
      view: How memory is seen.
      sequence: What there is to read.
      n: The number of the chunk.
      state: Reads the state of a memory at the chunk's start, given its name.
      held: Reads what tokens project with, likewise.
      notes: Where notes lie.
    """
    tokens = {name: as_column(ref[view.rows(n)]) for name, ref in sequence.tokens.items()}

    memories = _memories(plan, sequence, lambda name: state(name).astype(plan.operand), held)
    return Page(tokens, Noted(notes or {}, view.item(n)), _place(plan, view, sequence, n), memories)


def _memories(plan, sequence, state, held):
    """Reads matrices where they lie."""

    def whole(name):
        matrix = held(name)
        if plan.anchor:
            matrix = matrix.astype(jnp.float32) + origin(name).astype(jnp.float32)
        return matrix.astype(plan.operand)

    def origin(name):
        return sequence.origins[name][...]

    return Memories(state, whole, None if sequence.origins is None else origin)


def _place(plan, view, sequence, n):
    """Where the documents of chunk n lie."""
    if not plan.segmented:
        return None
    number = as_column(sequence.segments[view.rows(n)])
    early = None if sequence.early is None else view.number(sequence.early, n)
    return Place(number, view.number(sequence.last, n), early)


def opened(plan, name, n):
    """The chunk at whose start a memory was in the state that the tokens of chunk n hold."""
    group = plan.chunks_of(name)
    return n if group == 1 else n - jax.lax.rem(n, group)


def look_back(plan, view, sequence, n, start, opening, notes=None) -> Page:
    """Opens chunk n when all has been read.

    Args:
      plan: What is computed.
      view: How memory is seen.
      sequence: What was read.
      n: The number of the chunk.
      start: Reads the state of a memory at the chunk's start, given its name.
      opening: Reads it at the start of the chunk that `opened` says.
      notes: Where notes lie.
    """

    def held(name):
        if not plan.holds:
            return start(name)
        matrix = opening(name)
        given = opened(plan, name, n) <= sequence.live[0]
        return jnp.where(given, sequence.held[name][...].astype(matrix.dtype), matrix)

    return look(plan, view, sequence, n, start, held, notes)


def _renews(plan, sequence, name, n):
    """Whether the tokens of chunk n are the first of the sequence to hold a memory's state."""
    first = (sequence.live[0] < n) & (n <= sequence.live[1])
    return first & (n == opened(plan, name, n))


class Noted(Mapping):
    """Notes of a chunk by name, read when they are asked for."""

    def __init__(self, refs, item):
        self.refs, self.item = refs, item

    def __getitem__(self, name):
        return as_column(self.refs[name][self.item])

    def __iter__(self):
        return iter(self.refs)

    def __len__(self):
        return len(self.refs)


def begin_forward(plan, view, sequence, ends, ends_held):
    """Lays the states where `forward` finds them."""
    for name in plan.names:
        ends[name][...] = sequence.states[name][...]
        if plan.holds:
            ends_held[name][...] = sequence.held[name][...]
    for name in plan.momenta:
        ends[name][...] = sequence.states[name][...]
    view.fence()


def forward(plan, view, sequence, n, y, ends, ends_held, starts):
    """Reads chunk n; `starts` takes the states at its start unless it is None."""
    for name in plan.names if plan.holds else ():
        _hold(plan, view, sequence, n, name, ends, ends_held)
    held = ends_held if plan.holds else ends
    for name in plan.names + plan.momenta if starts is not None else ():
        starts[name][view.item(n)] = ends[name][...].astype(starts[name].dtype)
    if plan.hidden:
        _forward_deep(plan, view, sequence, n, y, ends, held)
        return
    page = look(plan, view, sequence, n, *(lambda name, m=m: m[name][...] for m in (ends, held)))
    place, memories = page.place, page.memories
    lesson = chunks.attend(plan, page.tokens, place, memories, _bias(sequence))
    for name in plan.names:
        _, _, written, delta = chunks.teach(plan, lesson, place, memories, name)
        if name == "memory":
            part = chunks.read(plan, lesson, place, memories, written, delta)
            y[view.rows(n)] = part.astype(y.dtype)
        after = chunks.advance(plan, lesson, memories, name, ends[name][...], written, delta)
        if lesson.sweep is not None:
            momentum = ends[momentum_of(name)][...]
            after += lesson.sweep.gained * momentum
            momentum = chunks.advance_momentum(plan, lesson, momentum, written)
            _put(view, ends[momentum_of(name)], momentum)
        _put(view, ends[name], after)


def _forward_deep(plan, view, sequence, n, y, ends, held):
    """Reads chunk n with memories that are MLPs."""
    place, tokens = _place(plan, view, sequence, n), _in_full(view, sequence, n)
    memories = _memories(plan, sequence, *(lambda name, m=m: m[name][...] for m in (ends, held)))
    told = deep.tell(plan, tokens, place, memories, _bias(sequence))
    for name in plan.memories + plan.gates:
        part = deep.study(
            plan, told, place, memories, name,
            lambda layer, matrix: _put(view, ends[layer], matrix),
        )  # fmt: skip
        if part is not None:
            y[view.rows(n)] = part.astype(y.dtype)


def undo_deep(plan, view, sequence, n, starts, dy, gradients, dtokens, dbias):
    """Hands gradients back through chunk n of memories that are MLPs.

    Args:
      plan: What was computed.
      view: How memory is seen.
      sequence: What was read.
      n: The number of the chunk.
      starts: Where the states at the chunks' starts lie.
      dy: The gradient of what was read.
      gradients: Of the memories, after the chunk and then before it.
      dtokens: Where the gradients of tokens go.
      dbias: Where that of the gates' bias is summed; None without.
    """

    def start(name):
        return starts[name][view.item(n)]

    def held(name):
        if not plan.holds:
            return start(name)
        given = n <= sequence.live[0]
        return jnp.where(given, sequence.held[name][...], start(name).astype(jnp.float32))

    place, plan = _place(plan, view, sequence, n), plan._replace(undone=True)
    grad = dy[view.rows(n)].astype(jnp.float32)
    grad = grad if place is None else jnp.where(place.live, grad, 0)

    def tell(tokens, matrices, bias):
        return deep.tell(plan, tokens, place, matrices.memories(plan), bias)

    projections = [name for name in plan.memories if name != "memory"] + [*plan.gates]
    given = Matrices.of(plan, sequence, projections, start, held), _bias(sequence)
    told, untell = jax.vjp(tell, _in_full(view, sequence, n), *given)
    owed_by_all = None
    for name in plan.memories + plan.gates:

        def study(told, own, name=name):
            after = {}
            part = deep.study(plan, told, place, own.memories(plan), name, after.__setitem__)
            return after, part

        own = Matrices.of(plan, sequence, [name], start, held)
        (_, part), unstudy = jax.vjp(study, told, own)
        afters, helds = {}, {}
        for layer in deep.layers(name):
            after = gradients.states[layer][...]
            afters[layer], helds[layer] = owed(plan, sequence, gradients, layer, n, after, None)
            if plan.momentum:
                momentum = momentum_of(layer)
                afters[momentum] = gradients.states[momentum][...]
        dtold, change = unstudy((afters, None if part is None else grad))
        owed_by_all = dtold if owed_by_all is None else jax.tree.map(add, owed_by_all, dtold)
        for layer in deep.layers(name):
            _settle_deep(plan, view, gradients, layer, change.state[layer], helds[layer], change)
            if plan.momentum:
                momentum = momentum_of(layer)
                _put(view, gradients.states[momentum], change.state[momentum])
    gains, change, bias = untell(owed_by_all)
    for layer in change.held:
        state = gradients.states[layer][...]
        held_by_later = gradients.held[layer][...] if plan.holds else None
        _settle_deep(plan, view, gradients, layer, state, held_by_later, change)
    for name, ref in dtokens.items():
        rows = ref.at[view.rows(n)]
        rows[...] = gains[name].reshape(rows.shape).astype(rows.dtype)
    if dbias is not None:
        _put(view, dbias, dbias[...] + bias)


def _settle_deep(plan, view, gradients, layer, state, held, change):
    origin = None if change.origin is None else change.origin[layer]
    settle(plan, view, gradients, layer, state, held, [Change(change.held[layer], origin)])


def _in_full(view, sequence, n):
    """What tokens of chunk n bring, in float32."""
    return {
        name: as_column(ref[view.rows(n)]).astype(jnp.float32)
        for name, ref in sequence.tokens.items()
    }


def prepare(plan, sequence, page: Page, note) -> Lesson:
    """Takes notes of what was said in a chunk, which is returned; see `chunk.prepare`."""
    lesson = chunks.attend(plan, page.tokens, page.place, page.memories, _bias(sequence))
    chunks.prepare(plan, lesson, note)
    return lesson


def recall(plan, view, page: Page, dy, n, name, lesson, note):
    """Takes notes of what one memory learned from chunk n; see `chunk.recall`."""
    grad = dy[view.rows(n)] if name == "memory" else None
    if page.place is not None and grad is not None:
        grad = jnp.where(page.place.live, grad, 0)
    chunks.recall(plan, lesson, page.place, page.memories, name, grad, note)


def taker(plan, view, notes, n):
    """A function that stores what is noted of chunk n if there is room for it under its name."""

    def note(name, value):
        if name in notes:
            given = name == "dquery" and "q" not in plan.memories
            ref = notes[name].at[view.rows(n) if given else view.item(n)]
            ref[...] = value.reshape(ref.shape).astype(ref.dtype)

    return note


class Matrices(NamedTuple):
    """The matrices of some memories at a chunk's start by name, for `jax.vjp`, in float32.

    Attributes:
      state: States, and momenta by their names.
      held: What tokens project with.
      origin: Where states return to; None if nothing needs it.
    """

    state: Values
    held: Values
    origin: Values | None

    @classmethod
    def of(cls, plan, sequence, memories, state, held) -> "Matrices":
        """Those of memories, given functions that read them."""
        names = [layer for name in memories for layer in deep.layers(name)]
        momenta = [momentum_of(name) for name in names] if plan.momentum else []

        def full(read, names):
            return {name: read(name).astype(jnp.float32) for name in names}

        origins = sequence.origins
        origin = None if origins is None else full(lambda name: origins[name][...], names)
        return cls(full(state, names + momenta), full(held, names), origin)

    def memories(self, plan) -> Memories:
        """Reads them."""
        held, origin = self.held, self.origin
        if plan.anchor and origin is not None:
            held = {name: matrix + origin[name] for name, matrix in held.items()}
        origin = None if origin is None else origin.__getitem__
        return Memories(self.state.__getitem__, held.__getitem__, origin)


class Gradients(NamedTuple):
    """Where the gradients of the memories of one head are summed, by name.

    Attributes:
      states: Of the states after, then before the tokens, and of the momenta.
      held: Of what is held by the last tokens, then by the first; None unless the plan holds.
      origins: Of the origins; None without.
    """

    states: Values
    held: Values | None
    origins: Values | None


def owed(plan, sequence, gradients, name, n, after, answered):
    """Begins to undo chunk n of one memory; chunks behind it that hold another state are done with.

    Args:
      plan: What is computed.
      sequence: What was read.
      gradients: What is known of gradients.
      name: Which memory.
      n: The number of the chunk; -1 to end.
      after: The gradient of the state after it.
      answered: What the next chunk has still to add to the gradient of what it held, or None.

    Returns:
      The gradient of the state after the chunk; that of what tokens held that is not in it.
    """
    if not plan.holds:
        return after if answered is None else after + answered, None
    held = gradients.held[name][...]
    held = held if answered is None else held + answered
    renews = _renews(plan, sequence, name, n + 1)
    return after + jnp.where(renews, held, 0), jnp.where(renews, 0, held)


def unlearn(plan, view, page: Page, gradients, dy, n, name, after) -> tuple[Share, Array, Change]:
    """Hands the gradient of one memory after chunk n back through it; see `chunk.unlearn`.

    That of its momentum is stored.
    """
    place, grad, momentum = page.place, None, None
    if plan.read == "chunk":
        grad = dy[view.rows(n)]
        grad = grad if place is None else jnp.where(place.live, grad, 0)
    if plan.momentum:
        momentum = gradients.states[momentum_of(name)][...]
    share, state, momentum, change = chunks.unlearn(plan, *page, name, after, momentum, grad)
    if momentum is not None:
        _put(view, gradients.states[momentum_of(name)], momentum)
    return share, state, change


def settle(plan, view, gradients, name, state, held, changes):
    """Stores the gradients of one memory's matrices; `held` is None unless the plan holds."""
    origin = 0.0
    for change in changes:
        if change.held is not None and plan.holds:
            held += change.held
        elif change.held is not None:
            state += change.held
        if change.origin is not None:
            origin += change.origin
    _put(view, gradients.states[name], state)
    if plan.holds:
        _put(view, gradients.held[name], held)
    if gradients.origins is not None:
        _put(view, gradients.origins[name], gradients.origins[name][...] + origin)


def answer(plan, view, page: Page, n, slopes, dtokens):
    """Stores what the tokens of chunk n gain."""
    rows = view.rows(n)
    gains = chunks.answer(plan, *page, slopes)
    for name, ref in dtokens.items():
        ref[rows] = gains[name].reshape(ref.at[rows].shape).astype(ref.dtype)


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


def _hold(plan, view, sequence, n, name, ends, ends_held):
    """Lets tokens from chunk n on hold the state at its start, if it is the first of a group."""

    @pl.when(_renews(plan, sequence, name, n))
    def _():
        _put(view, ends_held[name], ends[name][...])


def _bias(sequence):
    return None if sequence.bias is None else sequence.bias[...]


def as_column(value):
    """A vector over tokens as a column; what has two axes as it is."""
    return value if value.ndim == 2 else value[:, None]


def _put(view, ref, value):
    """Replaces what a program may have read, so that all its threads read either old or new."""
    view.fence()
    ref[...] = value.astype(ref.dtype)
    view.fence()
