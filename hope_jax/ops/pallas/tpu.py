"""Runs matrix memories over a sequence on a TPU: a core goes through rows, heads and chunks.

The last axis of the grid is time. A head's states stay in on-chip memory from its first chunk to
its last, for blocks of an output are written back only when the next is another. Kernels are
compiled through Mosaic; on several chips they have to be launched inside a `jax.shard_map`. FLOPs
and bytes are those of `gpu`. They were compiled for v5e and v5p and simulated, never run on a TPU.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from hope_jax.ops.pallas import chunk as chunks
from hope_jax.ops.pallas import walk
from hope_jax.ops.pallas.chunk import GATE_ROWS, Plan, Values
from hope_jax.ops.pallas.walk import Gradients, Sequence, View

PLATFORM = "tpu"


class Launch(NamedTuple):
    """How a kernel is launched.

    Attributes:
      interpret: Whether to simulate a TPU, whose memory is NaN until it is written.
    """

    interpret: bool = False


VMEM = 16 * 2**20
"""Bytes of on-chip memory that a program may take."""


def fits(plan: Plan, dtype: jnp.dtype, widest: int) -> bool:
    """Says whether on-chip memory holds what a program needs; see `gpu.fits`.

    Chunks of 128 tokens with 128 features of five linear memories in float32 take some 10 MB. MLPs
    take up to 17 times their matrices, 24 times for float32 tokens, as compiled for v5e and v5p
    with chunks of 64; here twice that for chunks of 128.
    """
    if not plan.hidden:
        return True

    def numbers(outputs):
        """Those of an MLP; a matrix takes a multiple of 128 columns."""
        return outputs * -(-plan.hidden // 128) * 128 + plan.hidden * -(-widest // 128) * 128

    matrices = len(plan.memories) * numbers(widest) + len(plan.gates) * numbers(GATE_ROWS)
    copies = (17 if dtype == jnp.bfloat16 else 24) * max(1, plan.chunk / 64)
    return 4 * copies * matrices * (2 if plan.momentum else 1) <= VMEM


def forward(
    plan: Plan, sequence: Sequence, *, keep: bool, launch: Launch
) -> tuple[Array, Values, Values | None, Values | None]:
    """Reads a sequence and lets the memories learn it; see `gpu.forward`."""
    laid = _lay(plan, sequence)
    like = _like_tokens(laid)
    values = sequence.states["memory"].shape[2]
    states = jax.tree.map(_like, sequence.states)
    starts = {
        name: jax.ShapeDtypeStruct((*like.shape[:3], *state.shape[2:]), plan.operand)
        for name, state in sequence.states.items()
    }
    out = (
        jax.ShapeDtypeStruct((*like.shape[:4], values), like.dtype),
        states,
        _learning(plan, states) if plan.holds else None,
        starts if keep else None,
    )
    y, *rest = pl.pallas_call(
        partial(_forward_kernel, plan),
        out_shape=out,
        grid=like.shape[:3],
        in_specs=[_sequence_specs(laid)],
        out_specs=(
            _by_chunk(out[0]),
            *jax.tree.map(_by_head, out[1:3]),
            jax.tree.map(_by_chunk, out[3]),
        ),
        name="memory_forward",
        **_how(launch),
    )(laid)
    return _take_up(y), *rest


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
    """Hands gradients back through a sequence in two launches; see `gpu.backward`."""
    laid, dy_laid = _lay(plan, sequence), _lay_tokens(plan, dy)
    if plan.hidden:
        dtokens, *rest = _undo_deep(plan, laid, starts, dy_laid, dstates, dheld, launch)
        return _like_given(sequence, dtokens), *rest
    notes = _prepare(plan, laid, starts, dy_laid, launch)
    given = {}
    if "q" not in plan.memories:
        given["q"] = _take_up(notes.pop("dquery"))
    weight = notes.pop("weight", 1)
    dtokens, dstates, dheld, dorigins, dbias = _unlearn(
        plan, laid, notes, starts, dy_laid, dstates, dheld, launch
    )
    dtokens = _like_given(sequence, dtokens)
    dorigins = walk.read_by_origin(plan, sequence, notes, weight, dy, dorigins)
    return dtokens | given, dstates, dheld, dorigins, dbias


def _prepare(plan, sequence, starts, dy, launch):
    """Runs `chunk.prepare` on all chunks."""
    like = _like_tokens(sequence)
    restores = plan.segmented and not plan.anchor and sequence.origins is not None
    column = (plan.chunk, 1)
    out = walk.shapes_of_notes(plan, like.shape[:3], like.shape[4], dy.shape[4], column, restores)
    if "q" not in plan.memories:
        out["dquery"] = _like(sequence.tokens["q"])
    specs = partial(jax.tree.map, _by_chunk)
    return pl.pallas_call(
        partial(_prepare_kernel, plan),
        out_shape=out,
        grid=like.shape[:3],
        in_specs=[_sequence_specs(sequence), *_starts_specs(plan, starts), specs(dy)],
        out_specs=specs(out),
        name="memory_prepare",
        **_how(launch),
    )(sequence, starts, _learning(plan, starts), dy)


def _unlearn(plan, sequence, notes, starts, dy, dstates, dheld, launch):
    """Runs `chunk.unlearn` from the last chunk to the first."""
    batch, heads, count = dy.shape[:3]
    states = jax.tree.map(_like, dstates)
    out = (
        {name: _like(array) for name, array in sequence.tokens.items() if name != "q"},
        states,
        _learning(plan, states) if plan.holds else None,
        None if sequence.origins is None else _learning(plan, states),
        jax.ShapeDtypeStruct((batch, heads, 1, GATE_ROWS), jnp.float32) if plan.gates else None,
    )
    by_chunk = partial(jax.tree.map, partial(_by_chunk, count=count))
    by_head = partial(jax.tree.map, _by_head)
    operands = (sequence, notes, dy, dstates, dheld, starts, _learning(plan, starts))
    return pl.pallas_call(
        partial(_unlearn_kernel, plan),
        out_shape=out,
        grid=(batch, heads, count),
        in_specs=[
            _sequence_specs(sequence, count),
            *map(by_chunk, operands[1:3]),
            *map(by_head, operands[3:5]),
            *_starts_specs(plan, starts, count),
        ],
        out_specs=(by_chunk(out[0]), *by_head(out[1:])),
        name="memory_unlearn",
        **_how(launch),
    )(*operands)


def _undo_deep(plan, sequence, starts, dy, dstates, dheld, launch):
    """Runs `walk.undo_deep` from the last chunk to the first."""
    batch, heads, count = dy.shape[:3]
    states = jax.tree.map(_like, dstates)
    learning = _learning(plan, states)
    out = (
        jax.tree.map(_like, sequence.tokens),
        states,
        learning if plan.holds else None,
        learning,
        jax.ShapeDtypeStruct((batch, heads, 1, GATE_ROWS), jnp.float32) if plan.gates else None,
    )
    by_chunk = partial(jax.tree.map, partial(_by_chunk, count=count))
    by_head = partial(jax.tree.map, _by_head)
    return pl.pallas_call(
        partial(_undo_deep_kernel, plan),
        out_shape=out,
        grid=(batch, heads, count),
        in_specs=[
            _sequence_specs(sequence, count), *by_chunk((starts, dy)), *by_head((dstates, dheld)),
        ],
        out_specs=(by_chunk(out[0]), *by_head(out[1:])),
        name="memory_undo",
        **_how(launch),
    )(sequence, starts, dy, dstates, dheld)  # fmt: skip


def _how(launch):
    order = ("parallel", "parallel", "arbitrary")
    simulated = pltpu.InterpretParams(uninitialized_memory="nan")
    return {
        "compiler_params": pltpu.CompilerParams(dimension_semantics=order),
        "interpret": simulated if launch.interpret else False,
    }


VIEW = View(
    rows=lambda _: ...,
    item=lambda _: ...,
    number=lambda ref, n: ref[pl.program_id(0), n],
    fence=lambda: None,
)
"""A program sees one chunk of its head."""


def _forward_kernel(plan, sequence, y, ends, ends_held, starts):
    """The kernel that reads a sequence."""
    n = pl.program_id(2)
    pl.when(n == 0)(lambda: walk.begin_forward(plan, VIEW, sequence, ends, ends_held))
    walk.forward(plan, VIEW, sequence, n, y, ends, ends_held, starts)


def _prepare_kernel(plan, sequence, starts, openings, dy, notes):
    """The kernel that takes notes of a chunk."""
    n = pl.program_id(2)
    note, page = walk.taker(plan, VIEW, notes, n), _look(plan, sequence, starts, openings, n)
    lesson = walk.prepare(plan, sequence, page, note)
    for name in plan.names:
        walk.recall(plan, VIEW, page, dy, n, name, lesson, note)


def _look(plan, sequence, starts, openings, n, notes=None):
    start, opening = (lambda name, m=m: m[name][...] for m in (starts, openings))
    return walk.look_back(plan, VIEW, sequence, n, start, opening, notes)


def _unlearn_kernel(
    plan, sequence, notes, dy, dends, dends_held, starts, openings,
    dtokens, dstates, dheld, dorigins, dbias,
):  # fmt: skip
    """The kernel that hands gradients back from chunk to chunk."""
    done, count = pl.program_id(2), pl.num_programs(2)
    n, gradients = count - 1 - done, Gradients(dstates, dheld, dorigins)
    pl.when(done == 0)(partial(_begin_backward, plan, gradients, dends, dends_held, dbias))
    shares, page = [], _look(plan, sequence, starts, openings, n, notes)
    for name in plan.names:
        after, held = walk.owed(plan, sequence, gradients, name, n, dstates[name][...], None)
        share, state, change = walk.unlearn(plan, VIEW, page, gradients, dy, n, name, after)
        walk.settle(plan, VIEW, gradients, name, state, held, [change])
        shares.append(share)
    whole = jax.tree.map(lambda *parts: sum(parts), *shares)
    slopes = chunks.charge(plan, *page[:3], whole)
    for name in plan.names:
        if name in slopes:
            change = chunks.blame(plan, page.place, name, slopes[name], page.tokens["x"])
            held = dheld[name][...] if plan.holds else None
            walk.settle(plan, VIEW, gradients, name, dstates[name][...], held, [change])
    walk.answer(plan, VIEW, page, n, slopes, dtokens)
    if plan.gates:
        dbias[...] += jnp.sum(slopes["gates"], 0, keepdims=True)


def _undo_deep_kernel(
    plan, sequence, starts, dy, dends, dends_held, dtokens, dstates, dheld, dorigins, dbias
):
    """The kernel that hands gradients back through memories that are MLPs."""
    done, gradients = pl.program_id(2), Gradients(dstates, dheld, dorigins)
    pl.when(done == 0)(partial(_begin_backward, plan, gradients, dends, dends_held, dbias))
    n = pl.num_programs(2) - 1 - done
    walk.undo_deep(plan, VIEW, sequence, n, starts, dy, gradients, dtokens, dbias)


def _begin_backward(plan, gradients, dends, dends_held, dbias):
    """Lays the gradients of what is left behind where kernels go on from."""
    for name in plan.names + plan.momenta:
        gradients.states[name][...] = dends[name][...]
    for name in plan.names if plan.holds else ():
        gradients.held[name][...] = dends_held[name][...]
    for ref in jax.tree.leaves((gradients.origins, dbias)):
        ref[...] = jnp.zeros(ref.shape, jnp.float32)


def _learning(plan, states):
    """The states without their momenta."""
    return {name: states[name] for name in plan.names}


def _like(array):
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _like_tokens(sequence):
    return next(array for array in sequence.tokens.values() if array.shape[4] > 1)


def _lay(plan, sequence):
    """Lays out what tokens have by heads and chunks; numbers of tokens become columns."""
    segments = sequence.segments
    if segments is not None:
        segments = segments.reshape(segments.shape[0], -1, plan.chunk, 1)
    tokens = {name: _lay_tokens(plan, array) for name, array in sequence.tokens.items()}
    return sequence._replace(tokens=tokens, segments=segments)


def _lay_tokens(plan, array):
    """`[B, T, H, K]` as `[B, H, N, C, K]`; `[B, T, H]` gets an axis of one feature."""
    array = jnp.swapaxes(array if array.ndim == 4 else array[..., None], 1, 2)
    return array.reshape(*array.shape[:2], -1, plan.chunk, array.shape[3])


def _like_given(sequence, laid):
    """Takes up what lies as `_lay` says, in the shapes of the tokens it belongs to."""
    return {name: _take_up(a).reshape(sequence.tokens[name].shape) for name, a in laid.items()}


def _take_up(array):
    """The reverse of `_lay_tokens`, with the axis of features."""
    array = array.reshape(*array.shape[:2], -1, array.shape[4])
    return jnp.swapaxes(array, 1, 2)


def _time(n, count):
    """The chunk of a step of the grid; from the last to the first if there is a count."""
    return n if count is None else count - 1 - n


def _by_chunk(array, count=None):
    """One chunk of one head of one row: `[B, H, N, ...]` is seen as `[...]`."""
    rest = array.shape[3:]
    return pl.BlockSpec(
        (None, None, None, *rest), lambda b, h, n: (b, h, _time(n, count), *[0] * len(rest))
    )


def _starts_specs(plan, starts, count=None):
    """The states at the start of a chunk, and at that of the first chunk of its group."""

    def opening(name, array):
        rest = array.shape[3:]

        def place(b, h, n):
            return b, h, walk.opened(plan, name, _time(n, count)), *[0] * len(rest)

        return pl.BlockSpec((None, None, None, *rest), place)

    openings = {name: opening(name, starts[name]) for name in plan.names}
    return jax.tree.map(partial(_by_chunk, count=count), starts), openings


def _by_head(array):
    """What one head of one row has for itself: `[B, H, ...]` is seen as `[...]`."""
    rest = array.shape[2:]
    return pl.BlockSpec((None, None, *rest), lambda b, h, _: (b, h, *[0] * len(rest)))


def _sequence_specs(sequence, count=None):
    def by_row(array):
        rest = array.shape[2:]
        return pl.BlockSpec(
            (None, None, *rest), lambda b, _, n: (b, _time(n, count), *[0] * len(rest))
        )

    def shared(array):
        rest = array.shape[1:]
        return pl.BlockSpec((None, *rest), lambda _b, h, _n: (h, *[0] * len(rest)))

    def scalars(_):
        return pl.BlockSpec(memory_space=pltpu.SMEM)

    return Sequence(
        jax.tree.map(partial(_by_chunk, count=count), sequence.tokens),
        jax.tree.map(by_row, sequence.segments),
        jax.tree.map(scalars, sequence.last),
        jax.tree.map(scalars, sequence.early),
        jax.tree.map(scalars, sequence.live),
        jax.tree.map(_by_head, sequence.states),
        jax.tree.map(_by_head, sequence.held),
        jax.tree.map(shared, sequence.origins),
        jax.tree.map(shared, sequence.bias),
    )
