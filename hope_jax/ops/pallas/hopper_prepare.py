"""Notes what tokens said and what they added on a Hopper GPU, for all chunks at once, as `prepare`.

A program for some chunks of each head, of four warpgroups, goes through the first phases of
`hopper_forward` again, but for what was kept of them, and undoes the read. As one program fills a
multiprocessor, it asks for what it reads of a chunk during the chunk before.

Cost for each token of a head with 64 features: 38 products of two 64 x 64 matrices for a chunk,
0.31 MFLOPs, and 3.0 kB read and written; 0.17 and 0.47 ms of an H100 for a batch of 8 x 4,096
tokens with 16 heads.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mosaic
from jaxtyping import Array

from hope_jax.ops.pallas.chunk import Plan, Values
from hope_jax.ops.pallas.hopper import (
    BY_COLUMN,
    MATRIX,
    MEMORIES,
    SIZE,
    SQUARE,
    Desk,
    Tiles,
    by_column,
    fetch_origins,
    fetch_start,
    launch,
    meet,
    put,
    room_for,
    whole,
    wide,
)
from hope_jax.ops.pallas.hopper_lesson import (
    GATES,
    KEYS,
    MAIN,
    VALUES,
    VECTORS,
    Lesson,
    places_of,
)
from hope_jax.ops.pallas.hopper_lesson import ROOM as LESSON
from hope_jax.ops.pallas.walk import Sequence

COLUMNS = (
    "write", "before", "after", "arrival", "departure", "forget", "through", "key_scale", "dlog",
    "scale_k", "scale_v", "scale_memory",
)  # fmt: skip
"""What is noted of each token as one number, in the order in which they lie in memory."""

OWED = len(VECTORS)
"""Where, behind `VECTORS`, lies what is owed for each token as the chunk's first state decays."""

LENGTH = 8
"""The most chunks that a program goes through: the next one's matrices come during one."""

ROOM = {name: count for name, count in LESSON.items() if name != "corner"} | dict.fromkeys(
    ("dy", "dying", "kept", "shares", "lent", "spans", "pairs"), 1
)
"""Matrices in shared memory, beside those of a lesson: the gradient of what was read, and that with
the weights of the chunk's first state; keys as they last; what reads have of what tokens added, and
its gradient; what is owed for spans of time, and for pairs of a query and a key."""


def scale_of(memory: Any) -> Any:
    """Where among `COLUMNS` lies what scaled a memory's targets; the gates have none."""
    return COLUMNS.index("scale_k") + jnp.minimum(memory, MAIN)


class Full(NamedTuple):
    """Barriers that say that what was asked for has come."""

    origin: Any
    state: Any
    tokens: Any


@partial(jax.jit, static_argnames=("plan", "interpret"))
def prepare(
    plan: Plan, sequence: Sequence, starts: Values, dy: Array, *, interpret: Any = False
) -> Values:
    """Runs `chunk.prepare` and `chunk.recall` on all chunks.

    Args:
      plan: What was computed; `hopper.takes` it.
      sequence: What was read.
      starts: The states at the chunks' starts, and inverse; see `hopper_forward.forward`.
      dy: The gradient of what was read.
      interpret: False, or how Mosaic is to interpret the kernel.

    Returns:
      Notes by name, with one axis for all chunks of all heads, `[B * H * N, ...]`: pull, key,
      value, ddelta, dkey, dstate, matrices; columns; and with an axis of memories in front delta
      and target, where those of the gates have zeros up to 64 features. The gradient of queries,
      dquery `[B, T, H, K]`, and what the read owes to the origin, read `[B, H, parts, V, K]`.
    """
    x = sequence.tokens["x"]
    batch, time, heads, _ = x.shape
    count = time // SIZE
    origin = sequence.origins or {}
    given = {
        "x": x,
        "q": sequence.tokens["q"],
        "dy": dy,
        "origin": [whole(origin[name]) for name in MEMORIES],
        "state": [starts[name].reshape(-1, *starts[name].shape[3:]) for name in MEMORIES],
        "inverse": starts["inverse"].reshape(-1, *SQUARE),
        "bias": sequence.bias,
        "shift": jnp.zeros(1, jnp.int32),
    }
    if plan.segmented:
        given["places"] = places_of(sequence, count)
    rows = jax.ShapeDtypeStruct((batch * heads * count, *SQUARE), plan.operand)
    each = jax.ShapeDtypeStruct((len(MEMORIES), *rows.shape), plan.operand)
    length = math.gcd(count, LENGTH)
    parts = batch, heads, count // length
    out = dict.fromkeys(("pull", "key", "value", "ddelta", "dkey", "dstate"), rows)
    out |= {
        "delta": each,
        "target": each,
        "columns": jax.ShapeDtypeStruct((rows.shape[0], len(COLUMNS), SIZE), jnp.float32),
        "dquery": jax.ShapeDtypeStruct(x.shape, x.dtype),
        "read": jax.ShapeDtypeStruct((*parts, *SQUARE), jnp.float32),
    }
    tiles, places = room_for(plan, ROOM)
    vectors = mosaic.SMEM((len(VECTORS) + 1, SIZE), jnp.float32)
    full = Full(*(mosaic.Barrier(num_barriers=n) for n in (4, 4, 4)))
    scratch = tiles, vectors, full, mosaic.Barrier()
    kernel = partial(_kernel, plan, places, heads, count, length, bool(interpret))
    grid = {"head": heads, "row": batch, "part": parts[2]}
    return launch(kernel, "memory_prepare", out, scratch, interpret, grid)(given)


def _kernel(
    plan, places, heads, count, length, interpret, given, out, ref, vectors, full, weighed, together
):  # fmt: skip
    """Takes notes of a part of the chunks of a head."""
    desk = Desk(interpret, anew=True)
    axes = ("row", "head", "part", "memory")
    b, h, part, me = (jax.lax.axis_index(name) for name in axes)
    tiles = Tiles(ref, places, given["shift"][0])
    sit = partial(Lesson, plan, desk, given, tiles, vectors, weighed, together, b, h, me)
    asked, every = ("x", "q", "dy", "inverse"), range(len(MEMORIES))

    def fetch(name, n):
        """Asks for a matrix, each a warpgroup of its own."""

        @pl.when(me == asked.index(name))
        def _():
            source = given[name]
            if name == "inverse":
                source = source.at[(b * heads + h) * count + n]
            else:
                source = source.at[b, pl.ds(n * SIZE, SIZE), h]
            barrier = full.tokens.at[asked.index(name)]
            mosaic.copy_gmem_to_smem(source, sit().fresh(n)(name), barrier)

    def fetch_state(n, first=False):
        i, barriers = (b * heads + h) * count + n, [full.state.at[m] for m in every]
        fetch_start(desk, me, sit().fresh(n), given["state"], i, barriers, first)

    def tell(i, name, value, memory: Any = None):
        if name == "target":
            put(out["target"].at[memory, i], value)
        elif name == "scale":
            put(out["columns"].at[i, scale_of(memory)], value)
        else:
            put(out["columns"].at[i, COLUMNS.index(name)], value)

    def lend(lesson, n):
        """Phase 2 of the third, beside: what tokens read, and what is owed as the state decays."""
        tiles = lesson.fresh(n)
        weights, before = lesson.reach(n)
        shares = weights * desk.dot((tiles("q"), desk.turn(tiles("key"))))
        put(tiles("shares"), shares)
        put(tiles("dying"), before * wide(tiles("dy")))

    def note_log(lesson, n, i):
        tiles = lesson.fresh(n)
        row, line = desk.grid(tiles.shift)
        first = jnp.where(row < line, 1.0, 0.0).astype(plan.operand)
        log = jnp.where(row > line, desk.dot((first, tiles("spans"))), 0.0)
        later = row < line
        if plan.read == "current":
            later = row <= line
            log += wide(tiles("spans"))
        if plan.segmented:
            later = later & lesson.same(n)
        owed = desk.read(vectors.at[OWED], BY_COLUMN, far=False)
        log += jnp.where(later, by_column(owed), 0.0)
        tell(i, "dlog", jnp.sum(log, 1))

    def note_query(lesson, n, i, more):
        """Phases 3 and 4 of the first: the gradients of the state, and of queries."""
        del more
        tiles = lesson.fresh(n)
        put(out["dstate"].at[i], desk.dot((desk.turn(tiles("dying")), tiles("q"))))
        _, before = lesson.reach(n)
        dquery = desk.dot((tiles("dy"), tiles("state", MAIN))) * before
        put(vectors.at[OWED], jnp.sum(dquery * wide(tiles("q")), 1))
        dquery = desk.dot((tiles("dy"), tiles("origin", MAIN)), start=dquery)
        mosaic.commit_smem()
        meet(together)
        dquery = desk.dot((tiles("pairs"), tiles("key")), start=dquery)
        put(out["dquery"].at[b, pl.ds(n * SIZE, SIZE), h], dquery)

    def note_delta(lesson, n, i, more):
        """Phases 3 and 4 of the second: the gradients of what tokens added, and of retention."""
        del more
        tiles = lesson.fresh(n)
        put(tiles("lent"), desk.dot((desk.turn(tiles("shares")), tiles("dy"))))
        mosaic.commit_smem()
        put(out["ddelta"].at[i], desk.dot((desk.turn(tiles("inverse")), tiles("lent"))))
        meet(together)
        note_log(lesson, n, i)

    def unread(lesson, n, i, more):
        """Phase 3 of the third: what is owed for shares."""
        del i
        tiles = lesson.fresh(n)
        row, line = desk.grid(tiles.shift)
        weights, _ = lesson.reach(n)
        dshares = desk.dot((tiles("dy"), desk.turn(tiles("delta", MAIN))))
        put(tiles("spans"), jnp.where(row > line, dshares * wide(tiles("shares")), 0.0))
        put(tiles("pairs"), dshares * weights)
        mosaic.commit_smem()
        meet(together)

        @more
        def _():
            fetch("dy", n + 1)
            fetch_state(n + 1)

    def note_pull(lesson, n, i, more):
        """Phases 3 and 4 of the last: what pulls on what tokens added, and gradients of a read."""
        tiles = lesson.fresh(n)
        put(out["pull"].at[i], desk.dot((desk.turn(tiles("inverse")), tiles("kept"))))
        total = out["read"].at[b, h, part]
        read = desk.dot((desk.turn(tiles("dy")), tiles("q")), start=desk.read(total, MATRIX))
        put(total, read)
        meet(together)
        more(lambda: fetch("inverse", n + 1))
        put(out["dkey"].at[i], desk.dot((desk.turn(tiles("pairs")), tiles("q"))))

    def chunk(done, none):
        n = part * length + done
        i, more = (b * heads + h) * count + n, pl.when(done + 1 < length)
        lesson = sit(partial(tell, i))
        tiles = lesson.fresh(n)
        for barrier in (full.tokens.at[0], *(full.state.at[m] for m in every)):
            mosaic.barrier_wait(barrier)
        lesson.say(n)
        lesson.compare(n, me, waits=True)
        for name in asked[1:]:
            mosaic.barrier_wait(full.tokens.at[asked.index(name)])
        for place, name in ((KEYS, "key"), (VALUES, "value")):

            @pl.when(me == place)
            def _(name=name):
                mosaic.copy_smem_to_gmem(tiles(name), out[name].at[i])

        pl.when(me == VALUES)(
            lambda: put(tiles("kept"), wide(tiles("key")) * lesson.vector("after"))
        )
        pl.when(me == MAIN)(partial(lend, lesson, n))
        mosaic.commit_smem()
        meet(together)

        @more
        def _():
            fetch("x", n + 1)
            pl.when(me != MAIN)(lambda: fetch_state(n + 1))

        tiles = lesson.fresh(n)
        put(tiles("delta", me), desk.dot((tiles("inverse"), tiles("delta", me))))
        mosaic.commit_smem()
        mosaic.copy_smem_to_gmem(tiles("delta", me), out["delta"].at[me, i])
        for m, role in enumerate((note_query, note_delta, unread, note_pull)):
            pl.when(me == m)(partial(role, lesson, n, i, more))
        mosaic.wait_smem_to_gmem(0, wait_read_only=True)
        mosaic.commit_smem()
        meet(together)
        more(lambda: fetch("q", n + 1))
        return none

    fetch_origins(me, tiles, given["origin"], h, [full.origin.at[m] for m in every])
    fetch_state(part * length, first=True)
    for name in asked:
        fetch(name, part * length)
    zeros = desk.hold(jnp.zeros(SQUARE, jnp.float32))
    pl.when(me == GATES)(lambda: put(out["read"].at[b, h, part], zeros))
    for m in every:
        mosaic.barrier_wait(full.origin.at[m])
    jax.lax.fori_loop(0, length, chunk, None)
