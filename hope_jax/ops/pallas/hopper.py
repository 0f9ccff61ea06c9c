"""What the kernels for Hopper GPUs share: which plans they take, and a warpgroup's tools in Mosaic.

One program for each row and head has a warpgroup for each of its four memories. What they tell each
other lies in shared memory; between the phases of a chunk all wait for all.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mosaic
from jaxtyping import Array

from hope_jax.ops.pallas.chunk import GATE_ROWS, Plan

SIZE = 64
"""Tokens of a chunk, and features of a head: what one product of a warpgroup takes."""

MEMORIES = ("k", "v", "memory", "gates")
"""One for each warpgroup."""

MATRIX = mosaic.Layout.WGMMA
BY_ROW, BY_COLUMN = MATRIX.reduce(1), MATRIX.reduce(0)
"""How a warpgroup holds a matrix, a number for each row of one, and for each column."""

SQUARE = (SIZE, SIZE)


def takes(plan: Plan, keys: int, values: int) -> bool:
    """Says whether these kernels are made for a plan: that of the defaults, in bfloat16.

    Args:
      plan: What to compute.
      keys: Features of keys.
      values: Features of values.
    """
    return (
        plan.names == MEMORIES
        and plan.gates == ("eta", "alpha")
        and (plan.objective, plan.erases, plan.targets) == ("dot", "state", "self")
        and (plan.anchor, plan.normalize, plan.holds) == (True, True, False)
        and plan.read != "chunk"
        and not plan.momentum
        and plan.operand == jnp.bfloat16
        and (plan.chunk, plan.group, keys, values) == (SIZE, 1, SIZE, SIZE)
    )


class Tiles(NamedTuple):
    """Matrices in shared memory, by name.

    Attributes:
      ref: Where they lie, `[n, 64, 64]`.
      places: Where those of each name begin.
      shift: Zero, but no compiler knows it. It would compute the addresses of all products ahead of
        a loop, in which they are always the same, and then spill them.
    """

    ref: Any
    places: dict[str, int]
    shift: Any

    def __call__(self, name: str, memory: Any = 0) -> Any:
        """A matrix of a name, of those that have one for each memory the one of a memory."""
        return self.ref.at[self.places[name] + memory + self.shift]


def launch(
    kernel: Callable, name: str, out: Any, scratch: Any, interpret: Any, grid: dict[str, int]
) -> Any:
    """Makes a kernel of four warpgroups with a barrier, given last, at which all may wait for all.

    Args:
      kernel: Its body: what is given and what comes out, places in memory; then the scratch.
      name: What a profiler calls it.
      out: What comes out.
      scratch: Room in shared memory, and barriers.
      interpret: False, or how Mosaic is to interpret it.
      grid: The numbers of programs along named axes.
    """

    def body(*refs):
        kernel(*refs)

    body.__name__ = name
    return mosaic.kernel(
        body,
        out_type=out,
        scratch_types=(*scratch, mosaic.Barrier(num_arrivals=len(MEMORIES))),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=len(MEMORIES),
        thread_name="memory",
        compiler_params=mosaic.CompilerParams(approx_math=True),
        interpret=interpret,
    )


def room_for(plan: Plan, counts: dict[str, int]) -> tuple[Any, dict[str, int]]:
    """Room for so many matrices of each name, and where those of each name begin."""
    *places, count = itertools.accumulate(counts.values(), initial=0)
    layout = (mosaic.TilingTransform((8, SIZE)), mosaic.SwizzleTransform(2 * SIZE))
    room = mosaic.SMEM((count, *SQUARE), plan.operand, transforms=layout)
    return room, dict(zip(counts, places, strict=True))


def fetch_start(desk, me, tiles, starts, chunk, barriers, first=True):
    """Asks for a memory's state at the start of a chunk; of the gates' there are not all rows.

    Args:
      desk: Tools.
      me: Which memory.
      tiles: Where matrices lie.
      starts: The states of each memory, `[chunks, V, K]`.
      chunk: The number of the chunk.
      barriers: What says that they came, for each memory.
      first: Whether the rows that the gates have not are not zero yet.
    """
    for m, (states, barrier) in enumerate(zip(starts, barriers, strict=True)):

        @pl.when(me == m)
        def _(m=m, states=states, barrier=barrier):
            place = tiles("state", m)
            if first and m == MEMORIES.index("gates"):
                put(place, desk.hold(jnp.zeros(SQUARE, jnp.float32)))
                mosaic.commit_smem()
            place = place.at[pl.ds(0, states.shape[1])]
            mosaic.copy_gmem_to_smem(states.at[chunk], place, barrier)


def fetch_origins(me, tiles, origins, head, barriers):
    """Asks for the memories' origins, `[H, V, K]` each; see `fetch_start`."""
    for m, (origin, barrier) in enumerate(zip(origins, barriers, strict=True)):

        @pl.when(me == m)
        def _(m=m, origin=origin, barrier=barrier):
            mosaic.copy_gmem_to_smem(origin.at[head], tiles("origin", m), barrier)


def meet(together):
    """Waits at a barrier for all."""
    mosaic.barrier_arrive(together)
    mosaic.barrier_wait(together)


def lay(place, matrix):
    """Lays a matrix where the others read it, and returns what rounding takes of it."""
    rounded = matrix.astype(place.dtype)
    put(place, rounded)
    mosaic.commit_smem()
    return (matrix - rounded.astype(jnp.float32)).astype(place.dtype)


def whole(matrix: Array) -> Array:
    """Fills up what there is of the gates with zeros to a square."""
    missing = [(0, 0)] * (matrix.ndim - 2) + [(0, SIZE - n) for n in matrix.shape[-2:]]
    return jnp.pad(matrix, missing)


def narrow(name: str, matrices: Array) -> Array:
    """Takes away what `whole` filled up."""
    return matrices[..., :GATE_ROWS, :] if name == "gates" else matrices


class Desk(NamedTuple):
    """A warpgroup's tools; interpreted, they do without what the interpreter does not know.

    Attributes:
      interpret: Whether they are interpreted.
      anew: Whether `grid` leaves no numbers to be kept from chunk to chunk. It depends on what else
        a kernel keeps whether it spills more with them or without.
    """

    interpret: bool
    anew: bool = False

    def read(self, ref, layout, far=True):
        """Loads from memory, far or shared."""
        if self.interpret:
            return ref[...]
        return mosaic.load(ref, (), layout=layout, optimized=not far)

    def hold(self, value, layout=MATRIX):
        """Lays out a value that comes without a layout."""
        return value if self.interpret else mosaic.layout_cast(value, layout)

    def grid(self, shift):
        """The numbers of rows, computed anew for each `shift`, and of columns, as `anew` says."""
        count = jax.lax.broadcasted_iota
        if not self.interpret:
            count = partial(mosaic.broadcasted_iota, layout=MATRIX)
        row, line = (count(jnp.int32, SQUARE, axis) for axis in (0, 1))
        return row + shift, line + shift if self.anew else line

    def turn(self, ref):
        """The transpose of a matrix in shared memory."""
        return ref[...].T if self.interpret else ref.transpose((1, 0))

    def dot(self, *pairs, start=None) -> Array:
        """The sum of products of matrices in shared memory, and of `start`, in its place."""
        if self.interpret:
            wide = [[side[...].astype(jnp.float32) for side in pair] for pair in pairs]
            total: Any = sum(jnp.dot(a, b, precision="highest") for a, b in wide)
            return total if start is None else start + total

        def multiply(total):
            for a, b in pairs:
                mosaic.wgmma(total, a, b)

        def begin(total):
            multiply(total)
            return total[...]

        if start is None:
            total = pl.run_scoped(begin, mosaic.ACC(SQUARE, jnp.float32))
        else:
            total = pl.run_state(multiply)(mosaic.ACC.init(start))
        # Else LLVM may compute with the sum before it has been waited for; if it does, ptxas up to
        # 13.0 lets no product of the kernel begin before the last one has ended.
        return jax.lax.optimization_barrier(total)


def put(place: Any, value: Array) -> None:
    """Stores a value in the type of its place."""
    place[...] = value.astype(place.dtype)


def wide(matrix: Any) -> Array:
    """Reads a matrix as float32."""
    return matrix[...].astype(jnp.float32)


def by_row(vector: Array) -> Array:
    """A matrix of one number for each row."""
    return jax.lax.broadcast_in_dim(vector, SQUARE, (0,))


def by_column(vector: Array) -> Array:
    """A matrix of one number for each column."""
    return jax.lax.broadcast_in_dim(vector, SQUARE, (1,))
