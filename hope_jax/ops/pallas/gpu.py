"""Runs matrix memories over a sequence on a GPU: one program per row and head, through Triton.

A program carries the states of its head's memories in registers through the whole sequence, so
that the scan over chunks is one launch. With fewer programs than multiprocessors the rest of the
chip idles: batch x heads should be at least their number.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

from hope_jax.ops.pallas.chunk import GATE_ROWS, Plan, Values, learn, recite, unlearn


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
      bounds: The first and the last segment of a chunk; the last is below the first where all of
        the chunk is padding.
      states: The states before the first token, `[B, H, V, K]` in float32.
      held: What the tokens of the first chunk project with, if they are not the first.
      origins: Where the states return to, `[H, V, K]`, as operands.
      bias: Of the gates, `[H, 1, GATE_ROWS]`.
    """

    tokens: Values
    segments: Int[Array, "B T"] | None
    bounds: Int[Array, "B N 2"] | None
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
    like = next(array for array in sequence.tokens.values() if array.ndim == 4)
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
        partial(_forward, plan),
        out_shape=out,
        grid=(heads, batch),
        in_specs=[_sequence_specs(sequence)],
        out_specs=(_by_token(out[0]), *jax.tree.map(_by_head, out[1:])),
        compiler_params=triton.CompilerParams(num_warps=launch.warps, num_stages=launch.stages),
        interpret=launch.interpret,
        name="memory_forward",
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
    """Hands gradients back through a sequence, chunk by chunk from its end.

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
    batch, _, heads, _ = dy.shape
    states = jax.tree.map(_like, sequence.states)
    bias = jax.ShapeDtypeStruct((batch, heads, 1, GATE_ROWS), jnp.float32)
    out = (
        jax.tree.map(_like, sequence.tokens),
        states,
        states if plan.holds else None,
        None if sequence.origins is None else states,
        bias if plan.gates else None,
    )
    return pl.pallas_call(
        partial(_backward, plan),
        out_shape=out,
        grid=(heads, batch),
        in_specs=[
            _sequence_specs(sequence),
            jax.tree.map(_by_head, starts),
            _by_token(dy),
            jax.tree.map(_by_head, dstates),
            jax.tree.map(_by_head, dheld),
        ],
        out_specs=(jax.tree.map(_by_token, out[0]), *jax.tree.map(_by_head, out[1:])),
        compiler_params=triton.CompilerParams(num_warps=launch.warps, num_stages=launch.stages),
        interpret=launch.interpret,
        name="memory_backward",
    )(sequence, starts, dy, dstates, dheld)


def _like(array):
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _by_token(array):
    """One head's tokens of one row: `[B, T, H, K]` is seen as `[T, K]`."""
    block = (None, array.shape[1], None, *array.shape[3:])
    return pl.BlockSpec(block, lambda h, b: (b, 0, h, *[0] * (array.ndim - 3)))


def _by_head(array):
    """What one head of one row has for itself: `[B, H, ...]` is seen as `[...]`."""
    return pl.BlockSpec(
        (None, None, *array.shape[2:]), lambda h, b: (b, h, *[0] * (array.ndim - 2))
    )


def _sequence_specs(sequence):
    def by_row(array):
        return pl.BlockSpec((None, *array.shape[1:]), lambda _, b: (b, *[0] * (array.ndim - 1)))

    def shared(array):
        return pl.BlockSpec((None, *array.shape[1:]), lambda h, _: (h, *[0] * (array.ndim - 1)))

    return Sequence(
        jax.tree.map(_by_token, sequence.tokens),
        jax.tree.map(by_row, sequence.segments),
        jax.tree.map(by_row, sequence.bounds),
        jax.tree.map(_by_head, sequence.states),
        jax.tree.map(_by_head, sequence.held),
        jax.tree.map(shared, sequence.origins),
        jax.tree.map(shared, sequence.bias),
    )


def _forward(plan, sequence, y, ends, ends_held, starts):
    """The kernel that reads a sequence."""
    size = plan.chunk

    def chunk(n, carry):
        states, held = carry
        rows = pl.ds(n * size, size)
        tokens = _tokens(sequence, rows)
        if starts is not None:
            _store({name: ref.at[n] for name, ref in starts.items()}, states)

        def segment(j, carry):
            states, held, seen = carry
            origins, bias = _load(sequence.origins), _load(sequence.bias)
            live = _live(plan, sequence, rows, j)
            states, held = _enter(plan, origins, n, j, states, held)
            lesson = learn(plan, tokens, live, states, held, origins, bias)
            states, y_part = recite(plan, lesson, states, origins)
            return states, held if plan.holds else None, _merge(live, {"y": y_part}, seen)

        nothing = {"y": jnp.zeros((size, y.shape[1]), y.dtype)}
        states, held, seen = _segments(plan, sequence, n, segment, (states, held, nothing))
        _store({"y": y.at[rows]}, seen)
        return states, held

    carry = _load(sequence.states), _load(sequence.held)
    states, held = jax.lax.fori_loop(0, y.shape[0] // size, chunk, carry)
    _store(ends, states)
    _store(ends_held, held)


def _backward(
    plan, sequence, starts, dy, dends, dends_held, dtokens, dstates, dheld, dorigins, dbias
):
    """The kernel that hands gradients back."""
    size, count = plan.chunk, dy.shape[0] // plan.chunk

    def chunk(i, carry):
        n = count - 1 - i
        rows = pl.ds(n * size, size)
        tokens = _tokens(sequence, rows)

        def segment(k, carry):
            after, after_held, seen, bias_sum = carry
            j = _mirrored(plan, sequence, n, k)
            origins, bias = _load(sequence.origins), _load(sequence.bias)
            live = _live(plan, sequence, rows, j)
            states = {name: ref[n].astype(jnp.float32) for name, ref in starts.items()}
            states, held = _enter(plan, origins, n, j, states, _load(sequence.held))
            lesson = learn(plan, tokens, live, states, held, origins, bias)
            grad = dy[rows, :] if live is None else jnp.where(live, dy[rows, :], 0)
            slopes = unlearn(plan, tokens, live, states, origins, lesson, grad, after)
            before, before_held, to_origins = _leave(plan, sequence, n, j, slopes, after_held)
            for name, change in to_origins.items():
                dorigins[name][...] += change
            if plan.gates:
                bias_sum += slopes.bias
            return before, before_held, _merge(live, slopes.tokens, seen), bias_sum

        after, after_held, bias_sum = carry
        nothing = {name: jnp.zeros(tokens[name].shape, ref.dtype) for name, ref in dtokens.items()}
        carry = after, after_held, nothing, bias_sum
        after, after_held, seen, bias_sum = _segments(plan, sequence, n, segment, carry)
        for name, ref in dtokens.items():
            ref[rows, ...] = seen[name].reshape(ref.at[rows].shape).astype(ref.dtype)
        return after, after_held, bias_sum

    for ref in (dorigins or {}).values():
        ref[...] = jnp.zeros(ref.shape, ref.dtype)
    bias_sum = None if dbias is None else jnp.zeros(dbias.shape, dbias.dtype)
    carry = _load(dends), _load(dends_held), bias_sum
    before, before_held, bias_sum = jax.lax.fori_loop(0, count, chunk, carry)
    _store(dstates, before)
    _store(dheld, before_held)
    _store(dbias, bias_sum)


def _tokens(sequence, rows):
    """A chunk's tokens; gates as columns."""
    return {
        name: ref[rows, ...] if len(ref.shape) == 2 else ref[rows][:, None]
        for name, ref in sequence.tokens.items()
    }


def _live(plan, sequence, rows, segment):
    return sequence.segments[rows][:, None] == segment if plan.segmented else None


def _segments(plan, sequence, n, body, carry):
    """Goes through the segments of a chunk: one for each document that begins in it.

    A document start does what the end of a chunk does, and resets the states.
    """
    if not plan.segmented:
        return body(0, carry)
    return jax.lax.fori_loop(sequence.bounds[n, 0], sequence.bounds[n, 1] + 1, body, carry)


def _mirrored(plan, sequence, n, segment):
    if not plan.segmented:
        return segment
    return sequence.bounds[n, 0] + sequence.bounds[n, 1] - segment


def _enter(plan, origins, n, j, states, held):
    """The states at the start of segment j of chunk n, and what its tokens project with."""
    if plan.segmented:
        fresh = _fresh(plan, origins, states)
        states = _where(j > 0, fresh, states)
    if not plan.holds:
        return states, states
    return states, _where((n > 0) | (j > 0), states, held)


def _fresh(plan, origins, states):
    """The states of a memory that has read nothing."""
    if plan.anchor or origins is None:
        return jax.tree.map(jnp.zeros_like, states)
    return {name: origins[name].astype(jnp.float32) for name in states}


def _leave(plan, sequence, n, j, slopes, after_held):
    """Gradients of states and held ones before a segment, and what origins gather from it."""
    to_origins = {}
    if plan.anchor:
        to_origins = _sum(slopes.origins, slopes.held)
    both = _sum(slopes.states, slopes.held)
    if plan.holds:
        both = _sum(both, after_held)
        inside = _sum(slopes.held, after_held)
        nothing = jax.tree.map(jnp.zeros_like, inside)
        first = (n == 0) & (j == 0)
        both, after_held = _where(first, slopes.states, both), _where(first, inside, nothing)
    if plan.segmented:
        nothing = jax.tree.map(jnp.zeros_like, both)
        if not plan.anchor and sequence.origins is not None:
            to_origins = _where(j > 0, both, nothing)
        both = _where(j > 0, nothing, both)
    return both, after_held, to_origins


def _merge(live, part, seen):
    if live is None:
        return part
    return {name: jnp.where(live, part[name].astype(old.dtype), old) for name, old in seen.items()}


def _where(condition, first, second):
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), first, second)


def _sum(first, second):
    return jax.tree.map(jnp.add, first, second)


def _load(refs):
    return jax.tree.map(lambda ref: ref[...], refs)


def _store(refs, values):
    for ref, value in zip(jax.tree.leaves(refs), jax.tree.leaves(values), strict=True):
        ref[...] = value.astype(ref.dtype)
