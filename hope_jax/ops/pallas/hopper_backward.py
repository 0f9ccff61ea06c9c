"""Undoes memories on a Hopper GPU in one launch, through Mosaic: a warpgroup for each memory.

On its way back through the chunks a memory needs what all the others owe (`chunk.unlearn`). Here
they are neighbours: what they tell each other stays in shared memory. They go through a chunk in
four phases, between which all wait for all:

1. each for its memory: what is owed for its writes, and for its targets;
2. each a sum over all memories, whose products one accumulator takes: what is owed for values, for
   keys by what was added and by what was found, and for pairs of tokens;
3. what tokens said is undone as far as it is in proportion to that (`chunk.charge`);
4. each for its memory: the gradient of its state at the chunk's start.

The gradients of origins are sums over tokens, for which registers do not suffice: phase 4 adds to
them in the second cache. What the read owes its origin is summed by `hopper_prepare`.

Cost for each token of a head with 64 features: 54 products of two 64 x 64 matrices for a chunk,
0.44 MFLOPs, and 2.6 kB read and written, 2 kB more in the second cache; 0.23 and 0.41 ms of an H100
for a batch of 8 x 4,096 tokens with 16 heads.
"""

import itertools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mosaic

from hope_jax.ops.pallas.chunk import GATE_ROWS, Plan, Values
from hope_jax.ops.pallas.hopper import (
    BY_COLUMN,
    BY_ROW,
    MATRIX,
    MEMORIES,
    SIZE,
    SQUARE,
    Desk,
    Tiles,
    by_column,
    by_row,
    fetch_origins,
    fetch_start,
    launch,
    lay,
    meet,
    narrow,
    put,
    room_for,
    whole,
    wide,
)
from hope_jax.ops.pallas.hopper_lesson import GATES, KEYS, MAIN, place_of, places_of
from hope_jax.ops.pallas.hopper_prepare import COLUMNS, scale_of
from hope_jax.ops.pallas.walk import Gradients, Sequence

ROOM = dict.fromkeys(("origin", "after", "state", "delta", "owed", "target"), len(MEMORIES)) | {
    "pull": 1,
    "key": 1,
    "value": 1,
}
"""Matrices in shared memory:

- origin: the origins;
- after: the gradients of the states after the chunk, as operands;
- state: the states at the chunk's start; after phase 2 the first takes what the tokens are;
- delta: what tokens added; after phase 2 what is found of keys, then the slope of k; the slope
  of v; pairs, then keys as the chunk's first state sees them; spans, then the slope of gates;
- owed: what is owed for writes, times minus the write gate;
- target: what is owed for targets;
- pull, key, value: what all memories read of the chunk.
"""


class Full(NamedTuple):
    """Barriers that say that what was asked for has come; see `ROOM`."""

    origin: Any
    state: Any
    delta: Any
    tokens: Any
    shared: Any


@partial(jax.jit, static_argnames=("plan", "interpret"))
def unlearn(
    plan: Plan,
    sequence: Sequence,
    notes: Values,
    starts: Values,
    dstates: Values,
    *,
    interpret: Any = False,
) -> tuple[Gradients, Values]:
    """Runs `chunk.unlearn` and `chunk.charge` from the last chunk to the first.

    Args:
      plan: What was computed; `hopper.takes` it.
      sequence: What was read.
      notes: What `hopper_prepare.prepare` noted.
      starts: The states at the chunks' starts.
      dstates: The gradients of the states after the last token.
      interpret: False, or how Mosaic is to interpret the kernel.

    Returns:
      The gradients of the states before the tokens and of the origins; what `chunk.charge` returns.
    """
    place = batch, heads, count = starts["memory"].shape[:3]
    origin = sequence.origins or {}
    given = {name: note for name, note in notes.items() if name != "read"} | {
        "x": sequence.tokens["x"],
        "state": [starts[name].reshape(-1, *starts[name].shape[3:]) for name in MEMORIES],
        "origin": [whole(origin[name]) for name in MEMORIES],
        "after": jnp.stack([whole(dstates[name]) for name in MEMORIES], 2),
        "shift": jnp.zeros(1, jnp.int32),
    }
    if plan.segmented:
        given["places"] = places_of(sequence, count)
    rows = jax.ShapeDtypeStruct((batch * heads * count, *SQUARE), plan.operand)
    square = jax.ShapeDtypeStruct((batch, heads, len(MEMORIES), *SQUARE), jnp.float32)
    out = {
        "k": rows,
        "v": rows,
        "gates": jax.ShapeDtypeStruct((rows.shape[0], 2, SIZE), jnp.float32),
        "states": square,
        "origins": square,
    }
    tiles, places = room_for(plan, ROOM)
    full = Full(*(mosaic.Barrier(num_barriers=n) for n in (4, 4, 4, 1, 3)))
    scratch = tiles, mosaic.SMEM((6, SIZE), jnp.float32), full
    kernel = partial(_unlearn_kernel, plan, places, heads, count, bool(interpret))
    grid = {"head": heads, "row": batch}
    out = launch(kernel, "memory_unlearn", out, scratch, interpret, grid)(given)
    gates = jnp.pad(jnp.swapaxes(out["gates"], 1, 2), [(0, 0), (0, 0), (0, GATE_ROWS - 2)])
    slopes = {"k": out["k"], "v": out["v"], "gates": gates}
    slopes = {name: slope.reshape(*place, *slope.shape[1:]) for name, slope in slopes.items()}
    states = {name: narrow(name, out["states"][:, :, m]) for m, name in enumerate(MEMORIES)}
    origins = {name: narrow(name, out["origins"][:, :, m]) for m, name in enumerate(MEMORIES)}
    origins["memory"] += jnp.sum(notes["read"], 2)
    return Gradients(states, None, origins), slopes


def _unlearn_kernel(
    plan, places, heads, count, interpret, given, out, ref, vectors, full, together
):  # fmt: skip
    """Goes through all chunks of a head; see `unlearn`."""
    desk = Desk(interpret)
    b, h, me = (jax.lax.axis_index(name) for name in ("row", "head", "memory"))
    every, shared = range(len(MEMORIES)), ("pull", "key", "value")

    shift, times = given["shift"][0], itertools.count()

    def fresh(n):
        """See `hopper_lesson.Lesson.fresh`."""
        return Tiles(ref, places, shift & (n + next(times)))

    def number(n):
        return (b * heads + h) * count + n

    def fetch_state(i, first=False):
        barriers = [full.state.at[m] for m in every]
        fetch_start(desk, me, fresh(i), given["state"], i, barriers, first)

    def fetch_delta(i):
        source, barrier = given["delta"].at[me, i], full.delta.at[me]
        mosaic.copy_gmem_to_smem(source, fresh(i)("delta", me), barrier)

    def fetch_shared(name, n):
        @pl.when(me == shared.index(name))
        def _():
            source, barrier = given[name].at[number(n)], full.shared.at[shared.index(name)]
            mosaic.copy_gmem_to_smem(source, fresh(n)(name), barrier)

    def column(i, name, layout=BY_ROW):
        return desk.read(given["columns"].at[i, COLUMNS.index(name)], layout)

    def place(n, name, layout=BY_ROW):
        return place_of(desk, given["places"].at[b, n], name, layout)

    def vector(place):
        return by_column(desk.read(vectors.at[place], BY_COLUMN, far=False))

    def matrix(name, i):
        return desk.read(given[name].at[i], MATRIX)

    def of_main(name, i):
        """What is noted of the memory that is read; zeros for the others."""
        zeros = desk.hold(jnp.zeros(SQUARE, plan.operand))
        return jax.lax.cond(me == MAIN, partial(matrix, name, i), lambda: zeros)

    def owe(i, after):
        """Phase 1."""
        tiles, write, ddelta = fresh(i), column(i, "write"), of_main("ddelta", i)
        target = desk.read(given["target"].at[me, i], MATRIX)
        mosaic.barrier_wait(full.shared.at[shared.index("pull")])
        owed = desk.dot((tiles("pull"), desk.turn(tiles("after", me))))
        owed = (owed + wide(ddelta)) * by_row(write)
        target = wide(target)

        def unscale():
            along = jnp.sum(owed * target, 1)
            scale = desk.read(given["columns"].at[i, scale_of(me)], BY_ROW)
            return (owed - target * by_row(along)) * by_row(scale)

        def unscale_gates():
            # A rounded target may be as long as 1 or longer.
            rest = jnp.maximum(1 - target * target, 1e-30)
            return owed * rest * rest * jax.lax.rsqrt(rest)

        put(tiles("owed", me), -owed)
        put(tiles("target", me), jax.lax.cond(me == GATES, unscale_gates, unscale))
        for m in every:
            mosaic.barrier_wait(full.state.at[m])
        exact = after.astype(jnp.float32) + wide(tiles("after", me))
        put(vectors.at[me], jnp.sum(exact * wide(tiles("state", me)), 1))
        mosaic.commit_smem()

    def owe_values(n, i):
        """Phase 2 of the first warpgroup: what is owed for values."""
        tiles = fresh(i)
        begun = place(n, "open") if plan.segmented else None
        states, origins = (
            [(tiles("target", m), tiles(name, m)) for m in every] for name in ("state", "origin")
        )
        if begun is None:
            slope = desk.dot(*states, *origins)
        else:
            slope = desk.dot(*origins, start=desk.dot(*states) * by_row(begun))
        meet(together)
        put(tiles("delta", 1), slope)
        put(out["v"].at[i], slope)
        source = given["x"].at[b, pl.ds(n * SIZE, SIZE), h]
        mosaic.commit_smem()
        mosaic.copy_gmem_to_smem(source, tiles("state"), full.tokens)
        meet(together)

    def owe_pushed(n, i):
        """Phases 2 and 3 of the second: what is owed for keys."""
        del n
        tiles, kept = fresh(i), column(i, "after")
        slope = desk.dot(*((tiles("delta", m), tiles("after", m)) for m in every))
        slope *= by_row(kept)
        put(vectors.at[4], jnp.sum(wide(tiles("key")) * slope, 1))
        mosaic.commit_smem()
        meet(together)
        dkey, scale, before = matrix("dkey", i), column(i, "key_scale"), column(i, "before")
        meet(together)
        tiles = fresh(i)
        key, pairs = tiles("key"), tiles("delta", 2)
        slope = desk.dot((pairs, key), (desk.turn(pairs), key), start=slope)
        slope += wide(dkey) + wide(tiles("delta"))
        unit = wide(key)
        slope -= unit * by_row(jnp.sum(slope * unit, 1))
        slope *= by_row(scale)
        put(tiles("delta"), slope)
        put(out["k"].at[i], slope)
        put(tiles("delta", 2), unit * by_row(before))
        mosaic.commit_smem()

    def owe_found(n, i):
        """Phase 2 of the third: what is owed for keys by what was found to be erased."""
        del n
        tiles, before = fresh(i), column(i, "before")
        slope = desk.dot(*((tiles("owed", m), tiles("state", m)) for m in every))
        slope *= by_row(before)
        totals = [desk.read(vectors.at[m], BY_ROW, far=False) for m in every]
        put(vectors.at[0], totals[0] + totals[1] + totals[2] + totals[3])
        put(vectors.at[5], jnp.sum(wide(tiles("key")) * slope, 1))
        slope = desk.dot(*((tiles("owed", m), tiles("origin", m)) for m in every), start=slope)
        mosaic.commit_smem()  # for what was read of the states, which a copy is about to overwrite
        meet(together)
        put(tiles("delta"), slope)
        mosaic.commit_smem()
        meet(together)

    def owe_pairs(n, i):
        """Phases 2 and 3 of the last: what is owed for pairs of tokens, and for gates."""
        tiles = fresh(i)
        row, line = desk.grid(tiles.shift)
        write, key = column(i, "write"), tiles("key")
        arrival, departure = column(i, "arrival"), column(i, "departure", BY_COLUMN)
        same = None
        if plan.segmented:
            same = by_row(place(n, "number")) == by_column(place(n, "number", BY_COLUMN))

        def within(mask, found):
            return jnp.where(mask if same is None else mask & same, found, 0.0)

        pairs = desk.dot(*((tiles("owed", m), desk.turn(tiles("delta", m))) for m in every))
        step = jnp.sum(jnp.where(row == line, -pairs, 0.0), 1) / jnp.maximum(write, 1e-30)
        left = by_row(arrival) - by_column(departure)
        pairs *= within(row > line, jnp.exp(within(row > line, left)))
        pairs = pairs.astype(plan.operand)
        spans = pairs.astype(jnp.float32) * desk.dot((key, desk.turn(key)))
        meet(together)
        put(tiles("delta", 2), pairs)
        put(tiles("delta", 3), spans)
        mosaic.commit_smem()
        through, forget, dlog = (column(i, name) for name in ("through", "forget", "dlog"))
        meet(together)
        tiles = fresh(i)
        row, line = desk.grid(tiles.shift)
        later = jnp.where(row < line, 1.0, 0.0).astype(plan.operand)
        log = jnp.where(row > line, desk.dot((later, tiles("delta", 3))), 0.0)
        log += within(row > line, vector(4)) + within(row < line, vector(5))
        if plan.segmented:
            through *= place(n, "ending")
        log += by_row(through) * vector(0)
        log = jnp.sum(log, 1) + dlog
        step *= 1 - write / plan.write_max
        log *= forget
        put(out["gates"].at[i, 0], step)
        put(out["gates"].at[i, 1], log)
        slope = jnp.where(line == 0, by_row(step), jnp.where(line == 1, by_row(log), 0.0))
        put(tiles("delta", 3), slope)
        mosaic.commit_smem()

    def blame(tiles, *told):
        """Adds to the gradient of an origin; registers do not hold it from chunk to chunk."""
        origin = out["origins"].at[b, h, me]
        also = desk.turn(tiles("delta", me)), tiles("state")
        total = desk.read(origin, MATRIX)
        some, more = (
            partial(desk.dot, *told, start=total),
            partial(desk.dot, *told, also, start=total),
        )
        put(origin, jax.lax.cond(me == MAIN, some, more))

    def settle(n, i, after, through, dstate):
        """Phase 4: the gradient of the state at the chunk's start."""
        tiles = fresh(i)
        targets, slopes, owed = tiles("target", me), tiles("delta", me), tiles("owed", me)
        blame(tiles, (desk.turn(owed), tiles("key")), (desk.turn(targets), tiles("value")))
        if plan.segmented:
            begun = by_row(place(n, "open"))
            put(targets, begun * wide(targets))
            pl.when(me != MAIN)(lambda: put(slopes, begun * wide(slopes)))
            mosaic.commit_smem()
        after = after.astype(jnp.float32) + wide(tiles("after", me))
        after = after * by_row(through) + wide(dstate)
        asked = (desk.turn(owed), tiles("delta", 2)), (desk.turn(targets), tiles("value"))
        after = desk.dot(*asked, start=after)
        answer = partial(desk.dot, (desk.turn(slopes), tiles("state")), start=after)
        after = jax.lax.cond(me == MAIN, lambda: after, answer)
        return lay(tiles("after", me), after)

    def chunk(done, after):
        n = count - 1 - done
        i, more = number(n), pl.when(n > 0)
        owe(i, after)
        meet(together)
        more(lambda: fetch_shared("pull", n - 1))
        for barrier in [full.shared.at[shared.index("key")], *(full.delta.at[m] for m in every)]:
            mosaic.barrier_wait(barrier)
        for m, role in enumerate((owe_values, owe_pushed, owe_found, owe_pairs)):
            pl.when(me == m)(partial(role, n, i))
        through, dstate = column(i, "through"), of_main("dstate", i)
        meet(together)
        more(lambda: pl.when(me != KEYS)(lambda: fetch_state(i - 1)))
        mosaic.barrier_wait(full.shared.at[shared.index("value")])
        mosaic.barrier_wait(full.tokens)
        after = settle(n, i, after, through, dstate)
        meet(together)

        @more
        def _():
            fetch_delta(i - 1)
            fetch_shared("key", n - 1)
            fetch_shared("value", n - 1)
            pl.when(me == KEYS)(lambda: fetch_state(i - 1))

        return after

    fetch_origins(me, fresh(0), given["origin"], h, [full.origin.at[m] for m in every])
    fetch_state(number(count - 1), first=True)
    fetch_delta(number(count - 1))
    for name in shared:
        fetch_shared(name, count - 1)
    put(out["origins"].at[b, h, me], desk.hold(jnp.zeros(SQUARE, jnp.float32)))
    after = desk.read(given["after"].at[b, h, me], MATRIX)
    after = lay(fresh(0)("after", me), after)
    for m in every:
        mosaic.barrier_wait(full.origin.at[m])
    after = jax.lax.fori_loop(0, count, chunk, after)
    put(out["states"].at[b, h, me], after.astype(jnp.float32) + wide(fresh(0)("after", me)))
