"""Runs matrix memories over a sequence on a GPU: one program per row and head, through Triton.

A program goes through the whole sequence, so that the scan over chunks is one launch. The states
lie in memory that it alone writes, and which the caches hold: registers would overflow. With
fewer programs than multiprocessors the rest of the chip idles: batch x heads should be at least
their number.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from hope_jax.ops.pallas import chunk as chunks
from hope_jax.ops.pallas.chunk import GATE_ROWS, Ledger, Memories, Place, Plan, Values


class Launch(NamedTuple):
    """How a kernel is launched.

    Attributes:
      warps: Warps of a program.
      stages: Depth of the software pipeline of loads.
      interpret: Whether to interpret the kernel instead of compiling it.
    """

    warps: int = 4
    stages: int = 1
    interpret: bool = False


class Sequence(NamedTuple):
    """What a kernel reads; any of it None if the plan does without.

    Attributes:
      tokens: By name, `[B, T, H, K]`, gates `[B, T, H]` in float32; T a multiple of the chunk.
      segments: The number of document starts in a token's chunk up to the token; -1 for padding.
      last: The number of the last token of a chunk that is not padding; -1 if there is none.
      states: The states before the first token, `[B, H, V, K]` in float32.
      held: What the tokens of the first chunk project with, if they are not the first.
      origins: Where the states return to, `[H, V, K]`, as operands.
      bias: Of the gates, `[H, 1, GATE_ROWS]`.
    """

    tokens: Values
    segments: Int[Array, "B T"] | None
    last: Int[Array, "B N"] | None
    states: Values
    held: Values | None
    origins: Values | None
    bias: Float[Array, "H 1 G"] | None


def forward(
    plan: Plan, sequence: Sequence, *, keep: bool, launch: Launch
) -> tuple[Array, Values, Values | None, Values | None]:
    """Reads a sequence and lets the memories learn it.

    Args:
      plan: What to compute.
      sequence: What to read.
      keep: Whether to keep the states at the chunks' starts for `backward`.
      launch: How.

    Returns:
      What was read `[B, T, H, V]`; the states after the last token; what the last live token
      projected with (None unless the plan holds); the states at the chunks' starts
      `[B, H, N, V, K]`, as operands (None unless kept).
    """
    like = _like_tokens(sequence)
    batch, time, heads, _ = like.shape
    states = jax.tree.map(_like, sequence.states)
    starts = {
        name: jax.ShapeDtypeStruct(
            (batch, heads, time // plan.chunk, *state.shape[2:]), plan.operand
        )
        for name, state in sequence.states.items()
    }
    values = sequence.states["memory"].shape[2]
    out = (
        jax.ShapeDtypeStruct((batch, time, heads, values), like.dtype),
        states,
        states if plan.holds else None,
        starts if keep else None,
    )
    return pl.pallas_call(
        partial(_forward, plan, _fence(launch)),
        out_shape=out,
        grid=(heads, batch),
        in_specs=[_sequence_specs(sequence)],
        out_specs=(_by_token(out[0]), *jax.tree.map(_by_head, out[1:])),
        name="memory_forward",
        **_how(launch),
    )(sequence)


def backward(
    plan: Plan,
    sequence: Sequence,
    starts: Values,
    dy: Array,
    dstates: Values,
    dheld: Values | None,
    *,
    launch: Launch,
) -> tuple[Values, Values, Values | None, Values | None, Array | None]:
    """Hands gradients back through a sequence.

    Three launches where nothing that tokens bring depends on states, as for fixed keys and
    values: `prepare` for all chunks at once, the recurrence of the states' gradient, the rest for
    all chunks at once. Otherwise the rest needs the recurrence and is needed by it: two launches.

    Args:
      plan: What was computed.
      sequence: What was read.
      starts: The states at the chunks' starts.
      dy: The gradient of what was read.
      dstates: The gradient of the states after the last token.
      dheld: The gradient of what the last live token projected with, None unless the plan holds.
      launch: How.

    Returns:
      The gradients of the tokens, of the states before them, of what the first chunk held (None
      unless the plan holds), and, per row of the batch, `[B, H, ...]`, of the origins (None
      without) and of the bias (None without).
    """
    notes = _prepare(plan, sequence, starts, dy, launch)
    given = {}
    if "q" not in plan.memories:
        given["q"] = notes.pop("dquery")
    weight = notes.pop("weight", 1)
    if plan.consults or sequence.origins is not None:
        call = (plan, sequence, notes, starts, dy, dstates, dheld, launch)
        dtokens, dstates, dheld, dorigins, dbias = _unlearn(*call)
    else:
        dstates, afters = _push_back(plan, sequence, notes, dstates, launch)
        dtokens = _unlearn_at_once(plan, sequence, notes, starts, afters, launch)
        dheld = dorigins = dbias = None
    if dorigins is not None and plan.read != "chunk" and (plan.anchor or "inherit" in notes):
        query = notes.get("query")
        query = sequence.tokens["q"] if query is None else _as_tokens(query)
        weighed = dy if plan.anchor else dy * _as_tokens(weight)
        read = jnp.einsum("BTHV,BTHK->BHVK", weighed, query, preferred_element_type=jnp.float32)
        dorigins = dorigins | {"memory": dorigins["memory"] + read}
    return dtokens | given, dstates, dheld, dorigins, dbias


def _prepare(plan, sequence, starts, dy, launch):
    """Runs `chunk.prepare` on all chunks."""
    like = _like_tokens(sequence)
    batch, time, heads, keys = like.shape
    count, values = time // plan.chunk, dy.shape[-1]
    restores = plan.segmented and not plan.anchor and sequence.origins is not None
    shapes = {
        "key": (plan.chunk, keys),
        "value": (plan.chunk, values),
        "gates": (plan.chunk, GATE_ROWS),
        "state": (values, keys),
        "column": (plan.chunk,),
        "number": (1, 1),
    }
    out = {
        name: jax.ShapeDtypeStruct(
            (batch, heads, count, *shapes[kind]),
            jnp.float32 if kind in ("column", "number", "gates") else plan.operand,
        )
        for name, kind in chunks.notes(plan, restores).items()
    }
    specs = jax.tree.map(_by_head, out)
    if "q" not in plan.memories:
        out["dquery"] = _like(sequence.tokens["q"])
        specs["dquery"] = _by_token(out["dquery"])
    return pl.pallas_call(
        partial(_prepare_kernel, plan),
        out_shape=out,
        grid=(heads, batch, count),
        in_specs=[_sequence_specs(sequence), jax.tree.map(_by_head, starts), _by_token(dy)],
        out_specs=specs,
        name="memory_prepare",
        **_how(launch),
    )(sequence, starts, dy)


def _unlearn(plan, sequence, notes, starts, dy, dstates, dheld, launch):
    """Runs `chunk.unlearn` from the last chunk to the first."""
    batch, _, heads, values = dy.shape
    states = jax.tree.map(_like, sequence.states)
    bias = jax.ShapeDtypeStruct((batch, heads, 1, GATE_ROWS), jnp.float32)
    tokens = {name: _like(a) for name, a in sequence.tokens.items() if name != "q"}
    shelf = {}
    for name in plan.names:
        width = GATE_ROWS if name == "gates" else values
        rows = jax.ShapeDtypeStruct((batch, heads, plan.chunk, width), plan.operand)
        shelf |= {"owed_" + name: rows, "dtarget_" + name: rows}
    out = (
        tokens,
        states,
        states if plan.holds else None,
        None if sequence.origins is None else states,
        bias if plan.gates else None,
        shelf,
    )
    operands = (sequence, notes, starts, dy, dstates, dheld)
    by_head = partial(jax.tree.map, _by_head)
    return pl.pallas_call(
        partial(_unlearn_kernel, plan, _fence(launch)),
        out_shape=out,
        grid=(heads, batch),
        in_specs=[
            _sequence_specs(sequence),
            by_head(notes),
            by_head(starts),
            _by_token(dy),
            by_head(dstates),
            by_head(dheld),
        ],
        out_specs=(jax.tree.map(_by_token, out[0]), *by_head(out[1:])),
        name="memory_unlearn",
        **_how(launch),
    )(*operands)[:-1]


def _push_back(plan, sequence, notes, dstates, launch):
    """The gradient of the state before the first token, and of the states after each chunk."""
    state, through = dstates["memory"], notes["through"]
    out = _like(state), _like(notes["dstate"])
    needed = ("through", "dstate", "pull", "ddelta", "before", "write", "erase")
    notes = {name: notes[name] for name in needed if name in notes}
    key = sequence.tokens["k"]
    count = through.shape[2]

    def kernel(notes, key, after, before, afters):
        def chunk(i, after):
            n = count - 1 - i
            afters[n] = after.astype(afters.dtype)
            rows = key[pl.ds(n * plan.chunk, plan.chunk), :]
            return chunks.push_back(plan, _notes(notes, n), rows, after)

        before[...] = jax.lax.fori_loop(0, count, chunk, after[...])

    before, afters = pl.pallas_call(
        kernel,
        out_shape=out,
        grid=(state.shape[1], state.shape[0]),
        in_specs=[jax.tree.map(_by_head, notes), _by_token(key), _by_head(state)],
        out_specs=tuple(map(_by_head, out)),
        name="memory_push_back",
        **_how(launch),
    )(notes, key, state)
    return {"memory": before}, {"memory": afters}


def _unlearn_at_once(plan, sequence, notes, starts, afters, launch):
    """Runs `chunk.unlearn` on all chunks, the gradients of the states after them being known."""
    tokens = {name: _like(a) for name, a in sequence.tokens.items() if name != "q"}
    heads, count = starts["memory"].shape[1:3]
    batch = starts["memory"].shape[0]

    def kernel(sequence, notes, starts, afters, dtokens):
        n = pl.program_id(2)
        shelf = {}
        ledger = Ledger(
            lambda name: afters[name][n].astype(jnp.float32),
            lambda *_: None,
            None,
            shelf.__setitem__,
            shelf.__getitem__,
        )
        _unlearn_chunk(plan, sequence, notes, starts, None, n, ledger, dtokens)

    by_head = partial(jax.tree.map, _by_head)
    return pl.pallas_call(
        kernel,
        out_shape=tokens,
        grid=(heads, batch, count),
        in_specs=[_sequence_specs(sequence), by_head(notes), by_head(starts), by_head(afters)],
        out_specs=jax.tree.map(_by_token, tokens),
        name="memory_unlearn",
        **_how(launch),
    )(sequence, notes, starts, afters)


def _how(launch):
    params = triton.CompilerParams(num_warps=launch.warps, num_stages=launch.stages)
    return {"compiler_params": params, "interpret": launch.interpret}


def _fence(launch):
    """Lets all threads of a program see what was written before any goes on."""
    return (lambda: None) if launch.interpret else triton.debug_barrier


def _like(array):
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _like_tokens(sequence):
    return next(array for array in sequence.tokens.values() if array.ndim == 4)


def _as_tokens(notes):
    """`[B, H, N, C, ...]` as `[B, T, H, ...]`; a column gets an axis of one feature."""
    notes = notes if notes.ndim == 5 else notes[..., None]
    batch, heads, count, size, width = notes.shape
    return jnp.swapaxes(notes.reshape(batch, heads, count * size, width), 1, 2)


def _by_token(array):
    """One head's tokens of one row: `[B, T, H, K]` is seen as `[T, K]`."""
    block = (None, array.shape[1], None, *array.shape[3:])
    return pl.BlockSpec(block, lambda h, b, *_: (b, 0, h, *[0] * (array.ndim - 3)))


def _by_head(array):
    """What one head of one row has for itself: `[B, H, ...]` is seen as `[...]`."""
    return pl.BlockSpec(
        (None, None, *array.shape[2:]), lambda h, b, *_: (b, h, *[0] * (array.ndim - 2))
    )


def _sequence_specs(sequence):
    def by_row(array):
        return pl.BlockSpec(
            (None, *array.shape[1:]), lambda _h, b, *_: (b, *[0] * (array.ndim - 1))
        )

    def shared(array):
        return pl.BlockSpec((None, *array.shape[1:]), lambda h, *_: (h, *[0] * (array.ndim - 1)))

    return Sequence(
        jax.tree.map(_by_token, sequence.tokens),
        jax.tree.map(by_row, sequence.segments),
        jax.tree.map(by_row, sequence.last),
        jax.tree.map(_by_head, sequence.states),
        jax.tree.map(_by_head, sequence.held),
        jax.tree.map(shared, sequence.origins),
        jax.tree.map(shared, sequence.bias),
    )


def _forward(plan, fence, sequence, y, ends, ends_held, starts):
    """The kernel that reads a sequence."""

    def chunk(n, _):
        rows = _rows(plan, n)
        place, tokens = _place(plan, sequence, n), _tokens(sequence, rows)
        memories = _memories(plan, sequence, lambda name: ends[name][...], n)
        bias = None if sequence.bias is None else sequence.bias[...]
        for name in plan.names if starts is not None else ():
            starts[name][n] = ends[name][...].astype(plan.operand)
        if plan.holds:
            _hold(plan, fence, sequence, n, place, memories, ends, ends_held)
        lesson = chunks.attend(plan, tokens, place, memories, bias)
        for name in plan.names:
            _, _, delta = chunks.teach(plan, lesson, place, memories, name)
            if name == "memory":
                part = chunks.read(plan, lesson, place, memories, delta)
                y[rows, :] = part.astype(y.dtype)
            after = chunks.advance(plan, lesson, memories, name, ends[name][...], delta)
            _put(fence, ends[name], after)
        return 0

    for name in plan.names:
        ends[name][...] = sequence.states[name][...]
        if plan.holds:
            ends_held[name][...] = sequence.held[name][...]
    fence()
    jax.lax.fori_loop(0, y.shape[0] // plan.chunk, chunk, 0)


def _hold(plan, fence, sequence, n, place, memories, ends, ends_held):
    """Keeps what the tokens of a chunk project with, for the one in which the sequence ends."""
    for name in plan.names:
        held = jnp.where(n == 0, sequence.held[name][...], ends[name][...])
        fresh = 0 if plan.anchor else memories.origin(name).astype(jnp.float32)
        held = jnp.where(place.last > 0, fresh, held)
        _put(fence, ends_held[name], jnp.where(place.last >= 0, held, ends_held[name][...]))


def _prepare_kernel(plan, sequence, starts, dy, notes):
    """The kernel that takes notes of a chunk."""
    n = pl.program_id(2)
    rows = _rows(plan, n)
    place, tokens = _place(plan, sequence, n), _tokens(sequence, rows)
    memories = _memories(plan, sequence, lambda name: starts[name][n], n)
    bias = None if sequence.bias is None else sequence.bias[...]

    def note(name, value):
        ref = notes[name]
        if name == "dquery" and "q" not in plan.memories:
            ref[rows, :] = value.astype(ref.dtype)
        else:
            ref[n] = value.reshape(ref.shape[1:]).astype(ref.dtype)

    lesson = chunks.attend(plan, tokens, place, memories, bias)
    grad = dy[rows, :]
    if place is not None:
        grad = jnp.where(place.live, grad, 0)
    chunks.prepare(plan, lesson, place, memories, grad, note)


def _unlearn_kernel(
    plan, fence, sequence, notes, starts, dy, dends, dends_held,
    dtokens, dstates, dheld, dorigins, dbias, shelf,
):  # fmt: skip
    """The kernel that hands gradients back from chunk to chunk."""
    count = dy.shape[0] // plan.chunk

    def chunk(i, pending):
        n = count - 1 - i
        place = _place(plan, sequence, n)

        def before(name, state, held):
            held = 0 if held is None else held
            if plan.holds and place is not None:
                last = pending & (place.last >= 0)
                ending = jnp.where(last, dends_held[name][...], 0)
                if dorigins is not None and not plan.anchor:
                    origin(name, jnp.where(place.last > 0, ending, 0))
                held += jnp.where(place.last > 0, 0, ending)
                _put(fence, dheld[name], jnp.where(n == 0, held, 0))
                held = jnp.where(n == 0, 0, held)
            _put(fence, dstates[name], state + held)

        def origin(name, change):
            _put(fence, dorigins[name], dorigins[name][...] + change)

        ledger = Ledger(
            lambda name: dstates[name][...],
            before,
            None if dorigins is None else origin,
            lambda name, rows: _put(fence, shelf[name], rows),
            lambda name: shelf[name][...],
        )
        bias = _unlearn_chunk(plan, sequence, notes, starts, dy, n, ledger, dtokens)
        if plan.gates:
            _put(fence, dbias, dbias[...] + bias)
        return pending if place is None else pending & (place.last < 0)

    for name in plan.names:
        dstates[name][...] = dends[name][...]
        if dorigins is not None:
            dorigins[name][...] = jnp.zeros(dorigins[name].shape, jnp.float32)
    if plan.gates:
        dbias[...] = jnp.zeros(dbias.shape, jnp.float32)
    fence()
    jax.lax.fori_loop(0, count, chunk, jnp.bool_(True))


def _unlearn_chunk(plan, sequence, notes, starts, dy, n, ledger, dtokens):
    """Hands gradients back through chunk n; returns that of the bias, if there is one."""
    rows = _rows(plan, n)
    place, tokens = _place(plan, sequence, n), _tokens(sequence, rows)
    memories = _memories(plan, sequence, lambda name: starts[name][n], n)
    grad = None
    if plan.read == "chunk":
        grad = dy[rows, :] if place is None else jnp.where(place.live, dy[rows, :], 0)
    slopes = chunks.unlearn(plan, tokens, _notes(notes, n), place, memories, ledger, grad)
    for name, ref in dtokens.items():
        ref[rows, ...] = slopes[name].reshape(ref.at[rows].shape).astype(ref.dtype)
    return slopes.get("bias")


def _rows(plan, n):
    return pl.ds(n * plan.chunk, plan.chunk)


class _Loaded(dict):
    """Notes of a chunk by name, loaded when they are asked for."""

    def __init__(self, refs, n):
        super().__init__(refs)
        self.n = n

    def __getitem__(self, name):
        value = super().__getitem__(name)[self.n]
        return value if value.ndim == 2 else value[:, None]


def _notes(refs, n):
    return _Loaded(refs, n)


def _tokens(sequence, rows):
    """A chunk's tokens; gates as columns."""
    return {
        name: ref[rows, ...] if len(ref.shape) == 2 else ref[rows][:, None]
        for name, ref in sequence.tokens.items()
    }


def _place(plan, sequence, n):
    if not plan.segmented:
        return None
    return Place(sequence.segments[_rows(plan, n)][:, None], sequence.last[n])


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


def _put(fence, ref, value):
    fence()
    ref[...] = value.astype(ref.dtype)
    fence()
