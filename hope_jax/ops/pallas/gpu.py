"""Runs matrix memories over a sequence on a GPU: one program per row and head, through Triton.

A program goes through the whole sequence, so that the scan over chunks is one launch. The states
lie in memory that it alone writes, and which the caches hold: registers would overflow. With
fewer programs than multiprocessors the rest of the chip idles: batch x heads should be at least
their number.

Cost for each token of a head of five adaptive memories (k, v, memory, eta, alpha), with 64
features, chunks of 64 and bfloat16 (a product of two 64 x 64 matrices is 8,192 FLOPs a token):

    forward    34 products, 0.28 MFLOPs;    0.4 kB read and written, as much again for `backward`
    prepare    39 products, 0.32 MFLOPs;    2.3 kB
    unlearn    45 products, 0.37 MFLOPs;    2.8 kB

On an H100 the arithmetic of a batch of 8 x 4,096 tokens with 16 heads is 0.5 ms and the traffic
0.9 ms at best. What is measured is 1.7, 2.6 and 8.8 ms: registers spill, above all in `unlearn`,
where some 380 addresses and descriptors of operands that do not change from chunk to chunk are
held through the loop. Neither twice the warps (products are doubled, not shared) nor all memories
stacked into one matrix of 256 rows (11.2 ms) made it faster.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array

from hope_jax.ops.pallas import chunk as chunks
from hope_jax.ops.pallas import walk
from hope_jax.ops.pallas.chunk import GATE_ROWS, Ledger, Plan, Values
from hope_jax.ops.pallas.walk import Sequence, View

PLATFORM = "gpu"


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


def fits(plan: Plan, dtype: jnp.dtype, widest: int) -> bool:
    """Says whether shared memory holds what a program needs at once.

    Args:
      plan: What to compute.
      dtype: Of the tokens.
      widest: The features of keys or of values, whichever are more.
    """
    tile = plan.chunk * max(plan.chunk, widest) * jnp.dtype(dtype).itemsize
    if len(plan.names) > 1:
        return tile <= 8192 and widest <= 64
    return tile <= 16384


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
        partial(_forward_kernel, plan, _view(plan, launch)),
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
    dorigins = walk.read_by_origin(plan, sequence, notes, weight, dy, dorigins)
    return dtokens | given, dstates, dheld, dorigins, dbias


def _prepare(plan, sequence, starts, dy, launch):
    """Runs `chunk.prepare` on all chunks."""
    like = _like_tokens(sequence)
    batch, time, heads, keys = like.shape
    count, values = time // plan.chunk, dy.shape[-1]
    restores = plan.segmented and not plan.anchor and sequence.origins is not None
    column = (plan.chunk,)
    out = walk.shapes_of_notes(plan, (batch, heads, count), keys, values, column, restores)
    specs = jax.tree.map(_by_head, out)
    if "q" not in plan.memories:
        out["dquery"] = _like(sequence.tokens["q"])
        specs["dquery"] = _by_token(out["dquery"])
    return pl.pallas_call(
        partial(_prepare_kernel, plan, _view(plan, launch)),
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
    shelf = {
        name: jax.ShapeDtypeStruct((batch, heads, *shape), plan.operand)
        for name, shape in walk.shapes_of_shelf(plan, values).items()
    }
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
        partial(_unlearn_kernel, plan, _view(plan, launch)),
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
    key, view = sequence.tokens["k"], _view(plan, launch)
    count = through.shape[2]

    def kernel(notes, key, after, before, afters):
        def chunk(i, after):
            n = count - 1 - i
            afters[n] = after.astype(afters.dtype)
            noted = walk.Noted(notes, view.item(n))
            return chunks.push_back(plan, noted, key[view.rows(n)], after)

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
        walk.unlearn(plan, _view(plan, launch), sequence, notes, starts, None, n, ledger, dtokens)

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


def _view(plan, launch):
    """A program sees all tokens and chunks of its head."""
    return View(
        rows=lambda n: (pl.ds(n * plan.chunk, plan.chunk), ...),
        item=lambda n: (n, ...),
        last=lambda ref, n: ref[n],
        fence=(lambda: None) if launch.interpret else triton.debug_barrier,
    )


def _like(array):
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _like_tokens(sequence):
    return next(array for array in sequence.tokens.values() if array.ndim == 4)


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
        jax.tree.map(lambda array: pl.BlockSpec(array.shape, lambda *_: (0,)), sequence.final),
        jax.tree.map(_by_head, sequence.states),
        jax.tree.map(_by_head, sequence.held),
        jax.tree.map(shared, sequence.origins),
        jax.tree.map(shared, sequence.bias),
    )


def _forward_kernel(plan, view, sequence, y, ends, ends_held, starts):
    """The kernel that reads a sequence."""

    def chunk(n, _):
        walk.forward(plan, view, sequence, n, y, ends, ends_held, starts)
        return 0

    walk.begin_forward(plan, view, sequence, ends, ends_held)
    jax.lax.fori_loop(0, y.shape[0] // plan.chunk, chunk, 0)


def _prepare_kernel(plan, view, sequence, starts, dy, notes):
    """The kernel that takes notes of a chunk."""
    walk.prepare(plan, view, sequence, starts, dy, pl.program_id(2), notes)


def _unlearn_kernel(
    plan, view, sequence, notes, starts, dy, dends, dends_held,
    dtokens, dstates, dheld, dorigins, dbias, shelf,
):  # fmt: skip
    """The kernel that hands gradients back from chunk to chunk."""
    count = dy.shape[0] // plan.chunk

    def chunk(i, _):
        walk.backward(
            plan, view, sequence, notes, starts, dy, dends_held, count - 1 - i,
            dtokens, dstates, dheld, dorigins, dbias, shelf,
        )  # fmt: skip
        return 0

    walk.begin_backward(plan, view, dends, dstates, dorigins, dbias)
    jax.lax.fori_loop(0, count, chunk, 0)
