"""Notes what tokens said and what they added on a Hopper GPU, for all chunks at once, as `prepare`.

A program for each chunk of each head, of four warpgroups, goes through the first phases of
`hopper_forward` again and undoes the read.

Cost for each token of a head with 64 features: 60 products of two 64 x 64 matrices for a chunk,
0.49 MFLOPs, and 3.0 kB read and written; 0.15 and 0.35 ms of an H100 for a batch of 8 x 4,096
tokens with 16 heads. It takes up to 1.4 ms there, 23 us a program: one fills a multiprocessor, and
nothing goes on while it begins and ends.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mosaic
from jaxtyping import Array

from hope_jax.ops.pallas.chunk import Plan, Values
from hope_jax.ops.pallas.hopper import (
    BY_COLUMN,
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
    KEYS,
    MAIN,
    ROOM,
    VALUES,
    VECTORS,
    Lesson,
    places_of,
)
from hope_jax.ops.pallas.walk import Sequence

COLUMNS = (
    "write", "before", "after", "arrival", "departure", "forget", "through", "key_scale", "dlog",
    "scale_k", "scale_v", "scale_memory",
)  # fmt: skip
"""What is noted of each token as one number, in the order in which they lie in memory."""

OWED = len(VECTORS)
"""Where, behind those, lies what is owed for each token as the chunk's first state decays."""


@partial(jax.jit, static_argnames=("plan", "interpret"))
def prepare(
    plan: Plan, sequence: Sequence, starts: Values, dy: Array, *, interpret: Any = False
) -> Values:
    """Runs `chunk.prepare` and `chunk.recall` on all chunks.

    Args:
      plan: What was computed; `hopper.takes` it.
      sequence: What was read.
      starts: The states at the chunks' starts.
      dy: The gradient of what was read.
      interpret: False, or how Mosaic is to interpret the kernel.

    Returns:
      Notes by name, with one axis for all chunks of all heads, `[B * H * N, ...]`: pull, key,
      value, ddelta, dkey, dstate, matrices; columns; and with an axis of memories in front delta
      and target, where those of the gates have zeros up to 64 features. The gradient of queries,
      dquery `[B, T, H, K]`.
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
        "bias": sequence.bias,
        "shift": jnp.zeros(1, jnp.int32),
    }
    if plan.segmented:
        given["places"] = places_of(sequence, count)
    rows = jax.ShapeDtypeStruct((batch * heads * count, *SQUARE), plan.operand)
    each = jax.ShapeDtypeStruct((len(MEMORIES), *rows.shape), plan.operand)
    out = dict.fromkeys(("pull", "key", "value", "ddelta", "dkey", "dstate"), rows)
    out |= {
        "delta": each,
        "target": each,
        "columns": jax.ShapeDtypeStruct((rows.shape[0], len(COLUMNS), SIZE), jnp.float32),
        "dquery": jax.ShapeDtypeStruct(x.shape, x.dtype),
    }
    extra = dict.fromkeys(("dy", "dying", "kept", "shares", "lent"), 1)
    tiles, places = room_for(plan, ROOM | extra)
    vectors = mosaic.SMEM((len(VECTORS) + 1, SIZE), jnp.float32)
    full = mosaic.Barrier(num_barriers=3 + 2 * len(MEMORIES))
    scratch = tiles, vectors, full, mosaic.Barrier()
    kernel = partial(_kernel, plan, places, heads, count, bool(interpret))
    grid = {"head": heads, "row": batch, "chunk": count}
    return launch(kernel, "memory_prepare", out, scratch, interpret, **grid)(given)


def _kernel(
    plan, places, heads, count, interpret, given, out, ref, vectors, full, weighed, together
):
    """Takes notes of a chunk."""
    desk = Desk(interpret)
    axes = ("row", "head", "chunk", "memory")
    b, h, n, me = (jax.lax.axis_index(name) for name in axes)
    i = (b * heads + h) * count + n
    tiles = Tiles(ref, places, given["shift"][0])

    def tell(name, value, memory: Any = None):
        if name == "target":
            put(out["target"].at[memory, i], value)
        elif name == "scale":
            place = COLUMNS.index("scale_k") + jnp.minimum(memory, MAIN)
            put(out["columns"].at[i, place], value)
        else:
            put(out["columns"].at[i, COLUMNS.index(name)], value)

    lesson = Lesson(plan, desk, given, tiles, vectors, weighed, together, b, h, me, tell)

    def begin():
        tokens = ("x", "q", "dy")
        for place, name in enumerate(tokens):

            @pl.when(me == place)
            def _(place=place, name=name):
                source = given[name].at[b, pl.ds(n * SIZE, SIZE), h]
                mosaic.copy_gmem_to_smem(source, tiles(name), full.at[place])

        fetch_start(desk, me, tiles, given["state"], i, [full.at[3 + m] for m in range(4)])
        origins = [full.at[7 + m] for m in range(4)]
        fetch_origins(me, tiles, given["origin"], h, origins)
        for barrier in (0, *range(3, 11)):
            mosaic.barrier_wait(full.at[barrier])

    def lend():
        """Phase 2 of the third, beside: what tokens read, and what is owed as the state decays."""
        weights, before = lesson.reach(n)
        shares = weights * desk.dot((tiles("q"), desk.turn(tiles("key"))))
        put(tiles("shares"), shares)
        put(tiles("dying"), before * wide(tiles("dy")))

    def note_log():
        row, line = desk.grid(tiles.shift)
        first = jnp.where(row < line, 1.0, 0.0).astype(plan.operand)
        log = jnp.where(row > line, desk.dot((first, tiles("corner", 0))), 0.0)
        later = row < line
        if plan.read == "current":
            later = row <= line
            log += wide(tiles("corner", 0))
        if plan.segmented:
            later = later & lesson.same(n)
        owed = desk.read(vectors.at[OWED], BY_COLUMN, far=False)
        log += jnp.where(later, by_column(owed), 0.0)
        tell("dlog", jnp.sum(log, 1))

    def note_query():
        """Phases 3 and 4 of the first: the gradients of the state, and of queries."""
        put(out["dstate"].at[i], desk.dot((desk.turn(tiles("dying")), tiles("q"))))
        _, before = lesson.reach(n)
        dquery = desk.dot((tiles("dy"), tiles("state", MAIN))) * before
        put(vectors.at[OWED], jnp.sum(dquery * wide(tiles("q")), 1))
        dquery = desk.dot((tiles("dy"), tiles("origin", MAIN)), start=dquery)
        mosaic.commit_smem()
        meet(together)
        dquery = desk.dot((tiles("corner", 1), tiles("key")), start=dquery)
        put(out["dquery"].at[b, pl.ds(n * SIZE, SIZE), h], dquery)

    def note_delta():
        """Phases 3 and 4 of the second: the gradients of what tokens added, and of retention."""
        put(tiles("lent"), desk.dot((desk.turn(tiles("shares")), tiles("dy"))))
        mosaic.commit_smem()
        put(out["ddelta"].at[i], desk.dot((desk.turn(tiles("inverse")), tiles("lent"))))
        meet(together)
        note_log()

    def unread():
        """Phase 3 of the third: what is owed for shares."""
        row, line = desk.grid(tiles.shift)
        weights, _ = lesson.reach(n)
        dshares = desk.dot((tiles("dy"), desk.turn(tiles("delta", MAIN))))
        put(tiles("corner", 0), jnp.where(row > line, dshares * wide(tiles("shares")), 0.0))
        put(tiles("corner", 1), dshares * weights)
        mosaic.commit_smem()
        meet(together)

    def note_pull():
        """Phases 3 and 4 of the last: what pulls on what tokens added, and the gradient of keys."""
        put(out["pull"].at[i], desk.dot((desk.turn(tiles("inverse")), tiles("kept"))))
        meet(together)
        put(out["dkey"].at[i], desk.dot((desk.turn(tiles("corner", 1)), tiles("q"))))

    begin()
    lesson.settle(n)
    for barrier in (1, 2):
        mosaic.barrier_wait(full.at[barrier])
    for place, name in ((KEYS, "key"), (VALUES, "value")):

        @pl.when(me == place)
        def _(name=name):
            mosaic.copy_smem_to_gmem(tiles(name), out[name].at[i])

    pl.when(me == VALUES)(lambda: put(tiles("kept"), wide(tiles("key")) * lesson.vector("after")))
    pl.when(me == MAIN)(lend)
    mosaic.commit_smem()
    meet(together)
    put(tiles("delta", me), desk.dot((tiles("inverse"), tiles("delta", me))))
    mosaic.commit_smem()
    mosaic.copy_smem_to_gmem(tiles("delta", me), out["delta"].at[me, i])
    for m, role in enumerate((note_query, note_delta, unread, note_pull)):
        pl.when(me == m)(role)
    mosaic.wait_smem_to_gmem(0, wait_read_only=True)
