"""Reads a sequence on a Hopper GPU in one launch, through Mosaic: a warpgroup for each memory.

One program for each row and head goes through the chunks, in phases between which all warpgroups
wait for all:

1. keys, values, and what the gates let through;
2. the last inverts what keys have in common, while the others compare what tokens want a memory to
   say with what it says;
3. each for its memory: what tokens add;
4. each for its memory: the state after the chunk.

The third reads meanwhile: while the last inverts, all but what the chunk's own tokens add to it.

Cost for each token of a head with 64 features: 45 products of two 64 x 64 matrices for a chunk,
0.37 MFLOPs, and 0.4 kB read and written, 0.5 kB more for `backward`; 0.2 ms of an H100 for the
one and 0.06 or 0.15 ms for the other, for a batch of 8 x 4,096 tokens with 16 heads. It takes
longer, for the products of a chunk wait for one another, ten of them to invert.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mosaic
from jaxtyping import Array

from hope_jax.ops.pallas.chunk import GATE_ROWS, Plan, Values
from hope_jax.ops.pallas.hopper import (
    MATRIX,
    MEMORIES,
    SIZE,
    SQUARE,
    Desk,
    Tiles,
    fetch_origins,
    launch,
    lay,
    meet,
    narrow,
    put,
    room_for,
    whole,
    wide,
)
from hope_jax.ops.pallas.hopper_lesson import (
    GATES,
    KEYS,
    MAIN,
    ROOM,
    VECTORS,
    Lesson,
    places_of,
)
from hope_jax.ops.pallas.walk import Sequence


@partial(jax.jit, static_argnames=("plan", "keep", "interpret"))
def forward(
    plan: Plan, sequence: Sequence, *, keep: bool, interpret: Any = False
) -> tuple[Array, Values, Values | None]:
    """Reads a sequence and lets the memories learn it.

    Args:
      plan: What to compute; `hopper.takes` it.
      sequence: What to read.
      keep: Whether to keep what `backward` asks for.
      interpret: False, or how Mosaic is to interpret the kernel.

    Returns:
      What was read `[B, T, H, V]`, the states after the last token, and as operands, None unless
      kept: the states at the chunks' starts `[B, H, N, V, K]` and, named inverse, what
      `chunk.Lesson.inverse` was for each chunk.
    """
    x = sequence.tokens["x"]
    batch, time, heads, _ = x.shape
    count = time // SIZE
    origin = sequence.origins or {}
    given = {
        "x": x,
        "q": sequence.tokens["q"],
        "origin": [whole(origin[name]) for name in MEMORIES],
        "state": jnp.stack([whole(sequence.states[name]) for name in MEMORIES], 2),
        "bias": sequence.bias,
        "shift": jnp.zeros(1, jnp.int32),
    }
    if plan.segmented:
        given["places"] = places_of(sequence, count)
    out: dict[str, Any] = {
        "y": jax.ShapeDtypeStruct(x.shape, x.dtype),
        "states": jax.ShapeDtypeStruct((batch, heads, len(MEMORIES), *SQUARE), jnp.float32),
    }
    if keep:
        rows = [GATE_ROWS if name == "gates" else SIZE for name in MEMORIES]
        out["starts"] = [
            jax.ShapeDtypeStruct((batch * heads * count, n, SIZE), plan.operand) for n in rows
        ]
        out["inverse"] = jax.ShapeDtypeStruct((batch * heads * count, *SQUARE), plan.operand)
    tiles, places = room_for(plan, ROOM | dict.fromkeys(("added", "shares", "seen", "rest"), 1))
    vectors = mosaic.SMEM((len(VECTORS), SIZE), jnp.float32)
    full = mosaic.Barrier(num_barriers=2 + len(MEMORIES))
    scratch = tiles, vectors, full, mosaic.Barrier()
    kernel = partial(_kernel, plan, places, heads, count, bool(interpret))
    grid = {"head": heads, "row": batch}
    out = launch(kernel, "memory_forward", out, scratch, interpret, grid)(given)
    states = {name: narrow(name, out["states"][:, :, m]) for m, name in enumerate(MEMORIES)}
    if not keep:
        return out["y"], states, None
    named = zip((*MEMORIES, "inverse"), (*out["starts"], out["inverse"]), strict=True)
    starts = {name: a.reshape(batch, heads, count, *a.shape[1:]) for name, a in named}
    return out["y"], states, starts


def _kernel(
    plan, places, heads, count, interpret, given, out, ref, vectors, full, weighed, together
):
    """Goes through all chunks of a head; see the top of this file."""
    desk = Desk(interpret)
    b, h, me = (jax.lax.axis_index(name) for name in ("row", "head", "memory"))
    tiles = Tiles(ref, places, given["shift"][0])
    lesson = Lesson(plan, desk, given, tiles, vectors, weighed, together, b, h, me)
    fresh = lesson.fresh
    of_tokens, of_origins = full.at[0], [full.at[2 + m] for m in range(len(MEMORIES))]

    def fetch(name, n):
        source = given[name].at[b, pl.ds(n * SIZE, SIZE), h]
        mosaic.copy_gmem_to_smem(source, fresh(n)(name), full.at[("x", "q").index(name)])

    def store_start(i):
        tiles = fresh(i)
        for m in range(len(MEMORIES)):

            @pl.when(me == m)
            def _(m=m):
                rows = pl.ds(0, GATE_ROWS if m == GATES else SIZE)
                mosaic.copy_smem_to_gmem(tiles("state", m).at[rows], out["starts"][m].at[i])

    def store_inverse(i):
        mosaic.copy_smem_to_gmem(fresh(i)("inverse"), out["inverse"].at[i])

    def look(n):
        """Phase 2 of the third, beside: what is read but for what the chunk's own tokens add."""
        tiles = fresh(n)
        q = tiles("q")
        mosaic.barrier_wait(full.at[1])
        weights, before = lesson.reach(n)
        put(tiles("shares"), weights * desk.dot((q, desk.turn(tiles("key")))))
        y = desk.dot((q, desk.turn(tiles("state", MAIN)))) * before
        y = desk.dot((q, desk.turn(tiles("origin", MAIN))), start=y)
        put(tiles("rest"), lay(tiles("seen"), y))
        mosaic.commit_smem()

    def add(n):
        """Phase 3: what tokens add."""
        tiles = fresh(n)
        delta = desk.dot((tiles("inverse"), tiles("delta", me)))
        pl.when(me == MAIN)(lambda: put(tiles("added"), delta))
        put(tiles("delta", me), delta * lesson.vector("after"))
        mosaic.commit_smem()

    def read(n):
        """Phase 4 of the third: what tokens read."""
        tiles = fresh(n)
        y = wide(tiles("seen")) + wide(tiles("rest"))
        y = desk.dot((tiles("shares"), tiles("added")), start=y)
        put(out["y"].at[b, pl.ds(n * SIZE, SIZE), h], y)

    def chunk(n, state):
        more = (me == KEYS) & (n + 1 < count)
        if "starts" in out:
            store_start((b * heads + h) * count + n)
        mosaic.barrier_wait(of_tokens)
        lesson.say(n)
        pl.when(me == GATES)(lambda: lesson.invert(n))
        pl.when(me != GATES)(lambda: lesson.compare(n, me, waits=True))
        pl.when(me == KEYS)(lambda: lesson.compare(n, GATES))
        pl.when(me == MAIN)(lambda: look(n))
        meet(together)
        pl.when(more)(lambda: fetch("x", n + 1))
        if "starts" in out:
            pl.when(me == GATES)(lambda: store_inverse((b * heads + h) * count + n))
        add(n)
        pl.when(me == MAIN)(lambda: read(n))
        tiles = fresh(n)
        state = state.astype(jnp.float32) + wide(tiles("state", me))
        state *= lesson.vector("through")
        state = desk.dot((desk.turn(tiles("delta", me)), tiles("key")), start=state)
        if "starts" in out:
            mosaic.wait_smem_to_gmem(0, wait_read_only=True)
        state = lay(tiles("state", me), state)
        meet(together)
        pl.when(more)(lambda: fetch("q", n + 1))
        return state

    fetch_origins(me, fresh(0), given["origin"], h, of_origins)

    @pl.when(me == KEYS)
    def _():
        fetch("x", 0)
        fetch("q", 0)

    state = lay(fresh(0)("state", me), desk.read(given["state"].at[b, h, me], MATRIX))
    for barrier in of_origins:
        mosaic.barrier_wait(barrier)
    meet(together)
    state = jax.lax.fori_loop(0, count, chunk, state)
    put(out["states"].at[b, h, me], state.astype(jnp.float32) + wide(fresh(0)("state", me)))
    mosaic.wait_smem_to_gmem(0)
