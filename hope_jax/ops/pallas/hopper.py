"""Undoes memories on a Hopper GPU in one launch, through Mosaic: a warpgroup for each memory.

On its way back through the chunks a memory needs what all the others owe (`chunk.unlearn`). Here
they are neighbours: one program for each row and head has a warpgroup for each of the memories k,
v, memory and gates, and what they tell each other stays in shared memory. They go through a chunk
in four phases, between which all wait for all:

1. each for its memory: what is owed for its writes, and for its targets;
2. each a sum over all memories, whose products one accumulator takes: what is owed for values, for
   keys by what was added and by what was found, and for pairs of tokens;
3. what tokens said is undone as far as it is in proportion to that (`chunk.charge`);
4. each for its memory: the gradient of its state at the chunk's start, and of its origin.

Cost for each token of a head with 64 features: 56 products of two 64 x 64 matrices for a chunk, 0.46
MFLOPs, and 2.6 kB read and written; 0.15 and 0.4 ms of an H100 for a batch of 8 x 4,096 tokens with
16 heads.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as mosaic
from jax.experimental.pallas import triton
from jaxtyping import Array

from hope_jax.ops.pallas.chunk import GATE_ROWS, Plan, Values
from hope_jax.ops.pallas.walk import Gradients, Sequence

SIZE = 64
"""Tokens of a chunk, and features of a head: what one product of a warpgroup takes."""

MEMORIES = ("k", "v", "memory", "gates")
"""One for each warpgroup."""

COLUMNS = (
    "write", "before", "after", "arrival", "departure", "forget", "through", "key_scale", "dlog",
    "scale_k", "scale_v", "scale_memory",
)  # fmt: skip
PLACES = ("number", "open", "ending", "live")
"""What there is of each token as one number, in the order in which they lie in memory."""

MATRIX = mosaic.Layout.WGMMA
BY_ROW, BY_COLUMN = MATRIX.reduce(1), MATRIX.reduce(0)
"""How a warpgroup holds a matrix, a number for each row of one, and for each column."""

SQUARE = (SIZE, SIZE)


def takes(plan: Plan, keys: int, values: int) -> bool:
    """Says whether `unlearn` is made for a plan: that of the defaults, in bfloat16."""
    return (
        plan.names == MEMORIES
        and plan.gates == ("eta", "alpha")
        and (plan.objective, plan.erases, plan.targets) == ("dot", "state", "self")
        and (plan.anchor, plan.normalize, plan.holds) == (True, True, False)
        and plan.read != "chunk"
        and plan.operand == jnp.bfloat16
        and (plan.chunk, plan.group, keys, values) == (SIZE, 1, SIZE, SIZE)
    )


TILES = ("origin", "after", "state", "delta", "owed", "target", "pull", "key", "value")


class Tiles(NamedTuple):
    """Matrices in shared memory, by name; the first six kinds for each memory.

    - origin: the origins;
    - after: the gradients of the states after the chunk, as operands;
    - state: the states at the chunk's start; after phase 2 the first takes what the tokens are;
    - delta: what tokens added; after phase 2 what is found of keys, then the slope of k; the slope
      of v; pairs, then keys as the chunk's first state sees them; spans, then the slope of gates;
    - owed: what is owed for writes, times minus the write gate;
    - target: what is owed for targets;
    - pull, key, value: what all memories read of the chunk.

    Attributes:
      ref: Where they lie, `[27, 64, 64]`.
      shift: Zero, but read anew for each chunk, so that no compiler takes addresses to be the same
        for all chunks: it would compute those of all products ahead, and spill them.
    """

    ref: Any
    shift: Any

    def __call__(self, name, memory=0):
        place = TILES.index(name)
        start = 4 * place if place < 6 else 18 + place
        return self.ref.at[start + memory + self.shift]


class Full(NamedTuple):
    """Barriers that say that what was asked for has come; see `Tiles`."""

    origin: Any
    state: Any
    delta: Any
    tokens: Any
    shared: Any


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
      plan: What was computed; `takes` it.
      sequence: What was read.
      notes: What `chunk.prepare` and `chunk.recall` noted.
      starts: The states at the chunks' starts.
      dstates: The gradients of the states after the last token.
      interpret: False, or how Mosaic is to interpret the kernel.

    Returns:
      The gradients of the states before the tokens and of the origins; what `chunk.charge` returns.
    """
    batch, heads, count = notes["pull"].shape[:3]
    place = batch, heads, count
    alike = ("pull", "key", "value", "ddelta", "dkey", "dstate")
    given = {
        **{name: _by_chunk(notes[name]) for name in alike},
        "columns": _by_chunk(_columns(plan, sequence, notes, count)),
        "state": [_by_chunk(_whole(starts[name])) for name in MEMORIES],
        "delta": [_by_chunk(_whole(notes["delta_" + name])).astype(plan.operand) for name in MEMORIES],
        "target": [_by_chunk(_whole(notes["target_" + name])).astype(plan.operand) for name in MEMORIES],
        "origin": [_whole(sequence.origins[name]) for name in MEMORIES],
        "x": sequence.tokens["x"],
        "after": jnp.stack([_whole(dstates[name]) for name in MEMORIES], 2),
        "shift": jnp.zeros(1, jnp.int32),
    }
    rows = jax.ShapeDtypeStruct((batch * heads * count, *SQUARE), plan.operand)
    out = {
        "k": rows,
        "v": rows,
        "gates": jax.ShapeDtypeStruct((batch * heads * count, 2, SIZE), jnp.float32),
        "states": jax.ShapeDtypeStruct((batch, heads, len(MEMORIES), *SQUARE), jnp.float32),
        "owed": jax.ShapeDtypeStruct((len(MEMORIES), *rows.shape), plan.operand),
        "target": jax.ShapeDtypeStruct((len(MEMORIES), *rows.shape), plan.operand),
    }
    layout = (mosaic.TilingTransform((8, SIZE)), mosaic.SwizzleTransform(2 * SIZE))
    tiles = mosaic.SMEM((27, *SQUARE), plan.operand, transforms=layout)
    full = Full(*(mosaic.Barrier(num_barriers=n) for n in (4, 4, 4, 1, 3)))
    vectors = mosaic.SMEM((6, SIZE), jnp.float32)
    out = mosaic.kernel(
        partial(_kernel, plan, heads, count, bool(interpret)),
        out_type=out,
        scratch_types=(tiles, vectors, full, mosaic.Barrier(num_arrivals=len(MEMORIES))),
        grid=(heads, batch),
        grid_names=("head", "row"),
        num_threads=len(MEMORIES),
        thread_name="memory",
        interpret=interpret,
    )(given)
    gates = jnp.pad(jnp.swapaxes(out["gates"], 1, 2), [(0, 0), (0, 0), (0, GATE_ROWS - 2)])
    slopes = {"k": out["k"], "v": out["v"], "gates": gates}
    slopes = {name: slope.reshape(*place, *slope.shape[1:]) for name, slope in slopes.items()}
    states = {name: _narrow(name, out["states"][:, :, m]) for m, name in enumerate(MEMORIES)}
    wide = jnp.pad(gates, [(0, 0), (0, 0), (0, SIZE - GATE_ROWS)]).astype(plan.operand)
    said = [out["owed"], out["target"], out["k"], out["v"], wide]
    origins = _blame(said, [notes["key"], notes["value"], sequence.tokens["x"]], place, interpret)
    origins = {name: _narrow(name, origins[:, :, m]) for m, name in enumerate(MEMORIES)}
    return Gradients(states, None, origins), slopes


def _blame(slopes, rows, place, interpret):
    """Hands gradients of what origins answered to them, `[B, H, memories, V, K]`.

    Args:
      slopes: What is owed for writes and for targets, `[memories, B * H * N, C, V]`, and the slopes
        of k, v and the gates, `[B * H * N, C, V]`.
      rows: What the origins were asked: keys and values `[B, H, N, C, K]`, tokens `[B, T, H, K]`.
      place: B, H, N.
      interpret: Whether to interpret the kernel instead of compiling it.
    """
    batch, heads, count = place
    slopes = [slope.reshape(*slope.shape[:-3], *place, *SQUARE) for slope in slopes]

    def kernel(owed, target, k, v, gates, key, value, x, origins):
        def add(n, total, slope):
            tokens = x[pl.ds(n * SIZE, SIZE)]
            pairs = [(owed[n], key[n]), (target[n], value[n])]
            pairs += [] if slope is None else [(slope[n], tokens)]
            for left, right in pairs:
                total += jax.lax.dot_general(
                    left, right, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
                )
            return total

        for m, slope in enumerate((k, v, None, gates)):

            @pl.when(pl.program_id(2) == m)
            def _(slope=slope):
                zeros = jnp.zeros(SQUARE, jnp.float32)
                origins[...] = jax.lax.fori_loop(0, count, partial(add, slope=slope), zeros)

    chunks = (count, *SQUARE)
    of_one = pl.BlockSpec((None, None, None, *chunks), lambda h, b, m: (m, b, h, 0, 0, 0))
    of_all = pl.BlockSpec((None, None, *chunks), lambda h, b, m: (b, h, 0, 0, 0))
    x = pl.BlockSpec((None, count * SIZE, None, SIZE), lambda h, b, m: (b, 0, h, 0))
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((batch, heads, len(MEMORIES), *SQUARE), jnp.float32),
        grid=(heads, batch, len(MEMORIES)),
        in_specs=[of_one, of_one, *[of_all] * 5, x],
        out_specs=pl.BlockSpec((None, None, None, *SQUARE), lambda h, b, m: (b, h, m, 0, 0)),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=bool(interpret),
        name="memory_blame",
    )(*slopes, *rows)


def _columns(plan, sequence, notes, count):
    """What there is of each token as one number, `[B, H, N, names, C]`."""
    shape = notes["write"].shape
    through = jnp.broadcast_to(notes["through"][..., 0], shape)
    columns = [through if name == "through" else notes[name] for name in COLUMNS]
    if plan.segmented:
        number = sequence.segments.reshape(-1, 1, count, SIZE)
        ending = number == sequence.last[:, None, :, None]
        places = {"number": number, "open": number == 0, "ending": ending, "live": number >= 0}
        columns += [jnp.broadcast_to(places[name], shape).astype(jnp.float32) for name in PLACES]
    return jnp.stack(columns, 3)


def _by_chunk(notes):
    """`[B, H, N, ...]` with one axis for all chunks of all heads: one number finds all of a chunk."""
    return notes.reshape(-1, *notes.shape[3:])


def _whole(matrix):
    """Fills up what there is of the gates with zeros to a square."""
    missing = [(0, 0)] * (matrix.ndim - 2) + [(0, SIZE - n) for n in matrix.shape[-2:]]
    return jnp.pad(matrix, missing)


def _narrow(name, matrices):
    return matrices[..., :GATE_ROWS, :] if name == "gates" else matrices


class Desk(NamedTuple):
    """A warpgroup's tools; interpreted, they do without what the interpreter does not know."""

    interpret: bool

    def read(self, ref, layout, far=True):
        """Loads from memory, far or shared."""
        if self.interpret:
            return ref[...]
        return mosaic.load(ref, (), layout=layout, optimized=not far)

    def hold(self, value, layout=MATRIX):
        """Lays out a value that comes without a layout."""
        return value if self.interpret else mosaic.layout_cast(value, layout)

    def grid(self):
        """The numbers of rows and of columns."""
        if self.interpret:
            return tuple(jax.lax.broadcasted_iota(jnp.int32, SQUARE, axis) for axis in (0, 1))
        return tuple(
            mosaic.broadcasted_iota(jnp.int32, SQUARE, axis, layout=MATRIX) for axis in (0, 1)
        )

    def turn(self, ref):
        """The transpose of a matrix in shared memory."""
        return ref[...].T if self.interpret else ref.transpose((1, 0))

    def dot(self, *pairs, start=None):
        """The sum of products of matrices in shared memory, and of `start`, whose place it takes."""
        if self.interpret:
            wide = [[side[...].astype(jnp.float32) for side in pair] for pair in pairs]
            total = sum(jnp.dot(a, b, precision="highest") for a, b in wide)
            return total if start is None else start + total

        def multiply(total):
            for a, b in pairs:
                mosaic.wgmma(total, a, b)

        def begin(total):
            multiply(total)
            return total[...]

        if start is None:
            return pl.run_scoped(begin, mosaic.ACC(SQUARE, jnp.float32))
        return pl.run_state(multiply)(mosaic.ACC.init(start))


def _wide(matrix):
    return matrix[...].astype(jnp.float32)


def _by_row(vector):
    return jax.lax.broadcast_in_dim(vector, SQUARE, (0,))


def _by_column(vector):
    return jax.lax.broadcast_in_dim(vector, SQUARE, (1,))


def _kernel(plan, heads, count, interpret, given, out, ref, vectors, full, together):
    """Goes through all chunks of a head; see the top of this file."""
    desk = Desk(interpret)
    b, h, me = (jax.lax.axis_index(name) for name in ("row", "head", "memory"))
    every, shared = range(len(MEMORIES)), ("pull", "key", "value")

    def fresh():
        return Tiles(ref, given["shift"][0])

    def meet():
        mosaic.barrier_arrive(together)
        mosaic.barrier_wait(together)

    def number(n):
        return (b * heads + h) * count + n

    def fetch(kind, place):
        """Asks for what each memory has of its own."""
        tiles = fresh()
        for m in every:

            @pl.when(me == m)
            def _(m=m):
                source, barrier = given[kind][m].at[place], getattr(full, kind).at[m]
                mosaic.copy_gmem_to_smem(source, tiles(kind, m), barrier)

    def fetch_shared(name, n):
        @pl.when(me == shared.index(name))
        def _():
            source, barrier = given[name].at[number(n)], full.shared.at[shared.index(name)]
            mosaic.copy_gmem_to_smem(source, fresh()(name), barrier)

    def column(i, name, layout=BY_ROW):
        return desk.read(given["columns"].at[i, (COLUMNS + PLACES).index(name)], layout)

    def vector(place):
        return _by_column(desk.read(vectors.at[place], BY_COLUMN, far=False))

    def matrix(name, i):
        return _wide(desk.read(given[name].at[i], MATRIX))

    def put(place, value):
        place[...] = value.astype(place.dtype)

    def keep(tiles, after):
        """Lays a gradient where the others read it, and returns what rounding takes of it."""
        rounded = after.astype(plan.operand)
        put(tiles("after", me), rounded)
        mosaic.commit_smem()
        return (after - rounded.astype(jnp.float32)).astype(plan.operand)

    def owe(i):
        """Phase 1."""
        tiles, zeros = fresh(), jnp.zeros(SQUARE, jnp.float32)
        mosaic.wait_smem_to_gmem(0, wait_read_only=True)
        mosaic.barrier_wait(full.shared.at[shared.index("pull")])
        owed = desk.dot((tiles("pull"), desk.turn(tiles("after", me))))
        main = me == MEMORIES.index("memory")
        owed += jax.lax.cond(main, lambda: matrix("ddelta", i), lambda: desk.hold(zeros))
        owed *= _by_row(column(i, "write"))
        targets = [partial(desk.read, source.at[i], MATRIX) for source in given["target"]]
        target = _wide(jax.lax.switch(me, targets))

        def unscale():
            along = jnp.sum(owed * target, 1)
            place = (COLUMNS + PLACES).index("scale_k") + jnp.minimum(me, 2)
            scale = desk.read(given["columns"].at[i, place], BY_ROW)
            return (owed - target * _by_row(along)) * _by_row(scale)

        def unscale_gates():
            rest = 1 - target * target
            return owed * rest * rest * jax.lax.rsqrt(jnp.maximum(rest, 1e-30))

        put(tiles("owed", me), -owed)
        gates = me == MEMORIES.index("gates")
        put(tiles("target", me), jax.lax.cond(gates, unscale_gates, unscale))
        for m in every:
            mosaic.barrier_wait(full.state.at[m])
        put(vectors.at[me], jnp.sum(_wide(tiles("after", me)) * _wide(tiles("state", me)), 1))
        mosaic.commit_smem()
        for kind in ("owed", "target"):
            mosaic.copy_smem_to_gmem(tiles(kind, me), out[kind].at[me, i])

    def owe_values(n, i):
        """Phase 2 of the first warpgroup: what is owed for values."""
        tiles = fresh()
        slope = desk.dot(*((tiles("target", m), tiles("state", m)) for m in every))
        if plan.segmented:
            slope *= _by_row(column(i, "open"))
        slope = desk.dot(*((tiles("target", m), tiles("origin", m)) for m in every), start=slope)
        meet()
        put(tiles("delta", 1), slope)
        put(out["v"].at[i], slope)
        source = given["x"].at[b, pl.ds(n * SIZE, SIZE), h]
        mosaic.copy_gmem_to_smem(source, tiles("state"), full.tokens)
        mosaic.commit_smem()
        meet()

    def owe_pushed(n, i):
        """Phases 2 and 3 of the second: what is owed for keys."""
        del n
        tiles = fresh()
        slope = desk.dot(*((tiles("delta", m), tiles("after", m)) for m in every))
        slope *= _by_row(column(i, "after"))
        put(vectors.at[4], jnp.sum(_wide(tiles("key")) * slope, 1))
        mosaic.commit_smem()
        meet()
        meet()
        tiles = fresh()
        key, pairs = tiles("key"), tiles("delta", 2)
        slope = desk.dot((pairs, key), (desk.turn(pairs), key), start=slope)
        slope += matrix("dkey", i) + _wide(tiles("delta"))
        unit = _wide(key)
        slope -= unit * _by_row(jnp.sum(slope * unit, 1))
        slope *= _by_row(column(i, "key_scale"))
        put(tiles("delta"), slope)
        put(out["k"].at[i], slope)
        put(tiles("delta", 2), unit * _by_row(column(i, "before")))
        mosaic.commit_smem()

    def owe_found(n, i):
        """Phase 2 of the third: what is owed for keys by what was found to be erased."""
        del n
        tiles = fresh()
        slope = desk.dot(*((tiles("owed", m), tiles("state", m)) for m in every))
        slope *= _by_row(column(i, "before"))
        put(vectors.at[0], sum(desk.read(vectors.at[m], BY_ROW, far=False) for m in every))
        put(vectors.at[5], jnp.sum(_wide(tiles("key")) * slope, 1))
        slope = desk.dot(*((tiles("owed", m), tiles("origin", m)) for m in every), start=slope)
        meet()
        put(tiles("delta"), slope)
        mosaic.commit_smem()
        meet()

    def owe_pairs(n, i):
        """Phases 2 and 3 of the last: what is owed for pairs of tokens, and for gates."""
        del n
        tiles = fresh()
        row, line = desk.grid()
        write, key = column(i, "write"), tiles("key")
        same = None
        if plan.segmented:
            same = _by_row(column(i, "number")) == _by_column(column(i, "number", BY_COLUMN))

        def within(mask, found):
            return jnp.where(mask if same is None else mask & same, found, 0.0)

        pairs = desk.dot(*((tiles("owed", m), desk.turn(tiles("delta", m))) for m in every))
        step = jnp.sum(jnp.where(row == line, -pairs, 0.0), 1) / jnp.maximum(write, 1e-30)
        left = _by_row(column(i, "arrival")) - _by_column(column(i, "departure", BY_COLUMN))
        pairs *= within(row > line, jnp.exp(within(row > line, left)))
        pairs = pairs.astype(plan.operand)
        spans = pairs.astype(jnp.float32) * desk.dot((key, desk.turn(key)))
        meet()
        put(tiles("delta", 2), pairs)
        put(tiles("delta", 3), spans)
        mosaic.commit_smem()
        meet()
        tiles = fresh()
        later = jnp.where(row < line, 1.0, 0.0).astype(plan.operand)
        log = jnp.where(row > line, desk.dot((later, tiles("delta", 3))), 0.0)
        log += within(row > line, vector(4)) + within(row < line, vector(5))
        through = column(i, "through")
        if plan.segmented:
            through *= column(i, "ending")
        log += _by_row(through) * vector(0)
        log = jnp.sum(log, 1) + column(i, "dlog")
        if plan.segmented:
            live = column(i, "live")
            log, step = live * log, live * step
        step *= 1 - write / plan.write_max
        log *= column(i, "forget")
        put(out["gates"].at[i, 0], step)
        put(out["gates"].at[i, 1], log)
        slope = jnp.where(line == 0, _by_row(step), jnp.where(line == 1, _by_row(log), 0.0))
        put(tiles("delta", 3), slope)
        mosaic.commit_smem()

    def settle(i, after):
        """Phase 4: the gradient of the state at the chunk's start."""
        tiles = fresh()
        targets, slopes, owed = tiles("target", me), tiles("delta", me), tiles("owed", me)
        main = me == MEMORIES.index("memory")
        if plan.segmented:
            begun = _by_row(column(i, "open"))
            mosaic.wait_smem_to_gmem(0, wait_read_only=True)
            put(targets, begun * _wide(targets))
            pl.when(~main)(lambda: put(slopes, begun * _wide(slopes)))
            mosaic.commit_smem()
        after = after.astype(jnp.float32) + _wide(tiles("after", me))
        asked = (desk.turn(owed), tiles("delta", 2)), (desk.turn(targets), tiles("value"))
        after = desk.dot(*asked, start=after * _by_row(column(i, "through")))
        after = jax.lax.cond(
            main,
            lambda: after + matrix("dstate", i),
            lambda: desk.dot((desk.turn(slopes), tiles("state")), start=after),
        )
        return keep(tiles, after)

    def chunk(done, after):
        n = count - 1 - done
        i, more = number(n), pl.when(n > 0)
        owe(i)
        meet()
        more(lambda: fetch_shared("pull", n - 1))
        for barrier in [full.shared.at[shared.index("key")], *(full.delta.at[m] for m in every)]:
            mosaic.barrier_wait(barrier)
        for m, role in enumerate((owe_values, owe_pushed, owe_found, owe_pairs)):
            pl.when(me == m)(partial(role, n, i))
        meet()
        more(lambda: pl.when(me > 0)(lambda: fetch("state", i - 1)))
        mosaic.barrier_wait(full.shared.at[shared.index("value")])
        mosaic.barrier_wait(full.tokens)
        after = settle(i, after)
        meet()

        @more
        def _():
            fetch("delta", i - 1)
            fetch_shared("key", n - 1)
            fetch_shared("value", n - 1)
            pl.when(me == 0)(lambda: fetch("state", i - 1))

        return after

    fetch("origin", h)
    fetch("state", number(count - 1))
    fetch("delta", number(count - 1))
    for name in shared:
        fetch_shared(name, count - 1)
    after = desk.read(given["after"].at[b, h, me], MATRIX)
    after = keep(fresh(), after)
    for m in every:
        mosaic.barrier_wait(full.origin.at[m])
    after = jax.lax.fori_loop(0, count, chunk, after)
    put(out["states"].at[b, h, me], after.astype(jnp.float32) + _wide(fresh()("after", me)))
    mosaic.wait_smem_to_gmem(0)
