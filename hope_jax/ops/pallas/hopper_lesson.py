"""What tokens of a chunk say to memories on a Hopper GPU, up to what they would add."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mosaic

from hope_jax.ops.pallas.chunk import Plan
from hope_jax.ops.pallas.hopper import (
    BY_COLUMN,
    BY_ROW,
    MEMORIES,
    SIZE,
    SQUARE,
    Desk,
    Tiles,
    by_column,
    by_row,
    put,
)

KEYS, VALUES, MAIN, GATES = range(len(MEMORIES))
"""The warpgroups by what they do for all."""

VECTORS = ("write", "log", "arrival", "departure", "before", "after", "through")
"""What there is of each token as one number, in shared memory; see `chunk.Lesson`."""

PLACES = ("number", "open", "ending", "whole")
"""Where tokens lie: see `chunk.Place`; whether theirs is the last document; all if no other is."""

CORNERS = (2, 4, 8, 16, 32)
"""Sizes of blocks that are merged, but for the first, of one token each."""

ROOM = dict.fromkeys(("origin", "state", "delta"), len(MEMORIES)) | {
    "x": 1,
    "q": 1,
    "key": 1,
    "value": 1,
    "inverse": 1,
    "corner": len(CORNERS),
}
"""Matrices in shared memory: origins, states at the chunk's start, what tokens add; what they are
and read with; keys, values; `chunk.Lesson.inverse`; what of it merges blocks of each size."""


def ignore(name: str, value: Any, memory: Any = None) -> None:
    """Does nothing with what is told."""
    del name, value, memory


@dataclass(frozen=True)
class Lesson:
    """Phases of a chunk, as functions of its number; see `hopper_forward`.

    Attributes:
      plan: What is computed.
      desk: Tools.
      given: What there is to read: bias, and if the plan is segmented what `places_of` returns.
      tiles: Where matrices lie.
      vectors: Where vectors lie.
      weighed: A barrier at which the gates say that vectors lie there.
      together: A barrier for all.
      row: Which row of the batch.
      head: Which head.
      memory: Which warpgroup this is.
      tell: Called with names and values: what there is of each token as one number, forget and
        key_scale beside `VECTORS`; and with a memory the target, and for all but the gates scale.
      times: Counts `fresh`.
    """

    plan: Plan
    desk: Desk
    given: dict[str, Any]
    tiles: Tiles
    vectors: Any
    weighed: Any
    together: Any
    row: Any
    head: Any
    memory: Any
    tell: Callable[..., None] = ignore
    times: Any = field(default_factory=itertools.count)

    def fresh(self, n: Any) -> Tiles:
        """Addresses of tiles, which are not those that another call returned."""
        return self.tiles._replace(shift=self.tiles.shift & (n + next(self.times)))

    def vector(self, name, layout=BY_ROW):
        """A matrix of what there is of each token, for each row or column."""
        found = self.desk.read(self.vectors.at[VECTORS.index(name)], layout, far=False)
        return (by_row if layout is BY_ROW else by_column)(found)

    def place(self, n, name, layout=BY_ROW):
        """Where tokens lie, as a matrix of what there is of each."""
        found = place_of(self.desk, self.given["places"].at[self.row, n], name, layout)
        return (by_row if layout is BY_ROW else by_column)(found)

    def same(self, n):
        """Whether the tokens of a row and of a column belong to one document."""
        return self.place(n, "number") == self.place(n, "number", BY_COLUMN)

    def later(self, n, found):
        """Zero but where the token of the row comes later in the document of the column's."""
        row, line = self.desk.grid(self.fresh(n).shift)
        seen = row > line
        if self.plan.segmented:
            seen = seen & self.same(n)
        return jnp.where(seen, found, 0.0)

    def decay(self, n):
        """See `chunk.Lesson.decay`."""
        left = self.later(n, self.vector("arrival") - self.vector("departure", BY_COLUMN))
        return self.later(n, jnp.exp(left))

    def consult(self, tiles, n, rows, memory):
        """What a memory says of rows; since their document began, its origin."""
        state, origin = (
            (rows, self.desk.turn(tiles(name, memory))) for name in ("state", "origin")
        )
        if not self.plan.segmented:
            return self.desk.dot(state, origin)
        return self.desk.dot(origin, start=self.desk.dot(state) * self.place(n, "open"))

    def say(self, n):
        """Phase 1: keys, values, and what the gates let through."""
        tiles = self.fresh(n)
        said = jax.lax.cond(
            self.memory == MAIN,
            lambda: self.desk.hold(jnp.zeros(SQUARE, jnp.float32)),
            lambda: self.consult(tiles, n, tiles("x"), self.memory),
        )

        def say_key():
            scale = jax.lax.rsqrt(jnp.sum(said * said, 1) + 1e-6)
            put(tiles("key"), said * by_row(scale))
            self.tell("key_scale", scale)

        pl.when(self.memory == KEYS)(say_key)
        pl.when(self.memory == VALUES)(lambda: put(tiles("value"), said))
        mosaic.commit_smem()
        mosaic.barrier_arrive(self.together)
        pl.when(self.memory == GATES)(lambda: self.weigh(n, said))
        mosaic.barrier_wait(self.together)

    def weigh(self, n, logits):
        """What the gates let through, and what is left of it when; see `chunk.attend`."""
        row, line = self.desk.grid(self.fresh(n).shift)
        write, retain = (
            jnp.sum(jnp.where(line == gate, logits, 0.0), 1)
            + self.given["bias"][self.head, 0, gate]
            for gate in (0, 1)
        )
        self.tell("forget", 1 / (1 + jnp.exp(retain)))
        small = jnp.exp(-jnp.abs(retain))
        # log1p(small): by its series where the logarithm of a sum with 1 would lose its digits.
        series = small * (1 - small * (0.5 - small / 3))
        rest = jnp.where(small < 0.01, series, jnp.log(1 + small))
        log = jnp.minimum(retain, 0.0) - rest
        put(self.vectors.at[VECTORS.index("log")], log)
        logs, seen = self.vector("log", BY_COLUMN), row >= line
        ending = logs
        if self.plan.segmented:
            seen = seen & self.same(n)
            ending *= self.place(n, "ending", BY_COLUMN)
        departure, last = jnp.sum(jnp.where(seen, logs, 0.0), 1), jnp.sum(ending, 1)
        weights = {
            "write": self.plan.write_max / (1 + jnp.exp(-write)),
            "arrival": departure - log,
            "departure": departure,
            "before": jnp.exp(departure - log),
            "after": jnp.exp(last - departure),
            "through": jnp.exp(last),
        }
        if self.plan.segmented:
            for name, where in (("before", "open"), ("after", "ending"), ("through", "whole")):
                there = place_of(self.desk, self.given["places"].at[self.row, n], where)
                weights[name] = jnp.where(there > 0, weights[name], 0.0)
        for name, weight in weights.items():
            put(self.vectors.at[VECTORS.index(name)], weight)
            self.tell(name, weight)
        mosaic.barrier_arrive(self.weighed)

    def invert(self, n):
        """Phase 2 of the last; see `chunk._unit_lower_inverse`."""
        tiles, operand = self.fresh(n), self.plan.operand
        row, line = self.desk.grid(tiles.shift)
        lower = self.desk.dot((tiles("key"), self.desk.turn(tiles("key"))))
        lower *= self.decay(n) * self.vector("write")
        differ = row ^ line
        for i, size in enumerate(CORNERS):
            corners = (differ >= size) & (differ < 2 * size)
            put(tiles("corner", i), jnp.where(corners, lower, 0.0))
        inverse = jnp.where(differ == 0, 1.0, jnp.where(differ == 1, -lower, 0.0)).astype(operand)
        mosaic.commit_smem()
        for i in range(len(CORNERS)):
            put(tiles("inverse"), inverse)
            half = self.desk.dot((inverse, tiles("corner", i))).astype(operand)
            mosaic.commit_smem()
            inverse -= self.desk.dot((half, tiles("inverse"))).astype(operand)
        put(tiles("inverse"), inverse)
        mosaic.commit_smem()

    def compare(self, n, memory, waits=False):
        """Phase 2: what tokens want a memory to say less what it says, as it weighs."""
        tiles = self.fresh(n)
        target = self.consult(tiles, n, tiles("value"), memory)

        def scale_gates():
            return target * jax.lax.rsqrt(target * target + 1)

        def scale():
            scale = jax.lax.rsqrt(jnp.sum(target * target, 1) + 1e-6)
            self.tell("scale", scale, memory)
            return target * by_row(scale)

        target = jax.lax.cond(memory == GATES, scale_gates, scale)
        self.tell("target", target, memory)
        key, turn = tiles("key"), self.desk.turn
        found = self.desk.dot((key, turn(tiles("state", memory))))
        if waits:
            mosaic.barrier_wait(self.weighed)
        found *= self.vector("before")
        found = self.desk.dot((key, turn(tiles("origin", memory))), start=found)
        put(tiles("delta", memory), (target - found) * self.vector("write"))
        mosaic.commit_smem()

    def reach(self, n):
        """What a read sees: weights of earlier writes, and of the chunk's first state."""
        weights, before = self.decay(n), self.vector("before")
        if self.plan.read == "current":
            row, line = self.desk.grid(self.fresh(n).shift)
            own = jnp.exp(self.vector("log"))
            weights, before = jnp.where(row == line, 1.0, own * weights), own * before
        return weights, before


def places_of(sequence, count):
    """Where the tokens of each chunk lie, `[B, N, layout and name, C]`, for `place_of`."""
    number = sequence.segments.reshape(-1, count, SIZE)
    last = sequence.last[:, :, None]
    alone = jnp.broadcast_to(last == 0, number.shape)
    return jnp.stack(2 * [number, number == 0, number == last, alone], 2).astype(jnp.float32)


def place_of(desk, places, name, layout=BY_ROW):
    """One of the `PLACES` of a chunk's tokens, as a vector.

    Columns have a copy of their own: the compiler makes one of two loads from the same address, and
    if it is wanted in two layouts looks in vain for the one to load it in.
    """
    return desk.read(places.at[PLACES.index(name) + len(PLACES) * (layout is BY_COLUMN)], layout)
