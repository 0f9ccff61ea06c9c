"""Runs a linear level with many inputs and long chunks on a GPU, through Triton.

Registers do not hold its deltas, and a chunk is work for all multiprocessors: forward and backward,
each chunk is two launches, one product by tiles each, which also do what a product alone would
leave to passes over all of the deltas and tokens.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Bool, Float

from hope_jax.ops.pallas.continuum import Slopes, Tokens, dot, taught_by, weighed_of

TILE = 128
"""Tokens, inputs and outputs of a program."""
STEP = 64
"""Of what is summed in a product, that is read at once."""
WARPS, STAGES = 8, 3
COLUMN, ROW, BATCH = range(3)
"""Axes of a grid; rows are those of tokens or of deltas."""


def answer(
    tokens: Tokens,
    slow: Float[Array, "B T O"],
    size: Float[Array, "B T"],
    stay: Float[Array, "B N"],
    *,
    interpret: bool,
) -> tuple[
    Float[Array, "B T O"], Float[Array, "B I O"], Bool[Array, "B N"], Float[Array, "B N I O"]
]:
    """As `continuum.answer`."""
    (batch, time, inputs), outputs, count = tokens.hidden.shape, slow.shape[-1], stay.shape[1]
    chunk, columns = time // count, outputs // TILE
    wide = jnp.promote_types(slow.dtype, jnp.float32)

    def tell(n, before, y, weighed, bound):
        given = {
            "n": (n, _number()),
            "tokens": (tokens, _tokens(tokens)),
            "size": (size, _see(size)),
            "before": (before, _see(before, None, None, COLUMN)),
        }
        left = {
            "y": (y, _see(y, None, COLUMN)),
            "weighed": (weighed, _see(weighed, None, COLUMN)),
            "bound": (bound, _own(bound)),
        }
        grid = columns, chunk // TILE, batch
        return _launch(_tell_kernel, "continuum_tell", chunk, grid, given, left, interpret)

    def move(n, weighed, bound, deltas, before, finite):
        given = {
            "n": (n, _number()),
            "hidden": (tokens.hidden, _see(tokens.hidden, None, ROW)),
            "decay": (tokens.decay, _see(tokens.decay)),
            "stay": (stay, _see(stay)),
            "weighed": (weighed, _see(weighed, None, COLUMN)),
            "bound": (bound, _own(bound)),
        }
        left = {
            "deltas": (deltas, _see(deltas, ROW, COLUMN)),
            "before": (before, _see(before, None, ROW, COLUMN)),
            "finite": (finite, _own(finite)),
        }
        grid = columns, inputs // TILE, batch
        return _launch(_move_kernel, "continuum_move", chunk, grid, given, left, interpret)

    def step(carry, _):
        n, y, weighed, bound, deltas, before, finite = carry
        deltas, before, finite = move(n, weighed, bound, deltas, before, finite)
        y, weighed, bound = tell(n + 1, before, y, weighed, bound)
        return (n + 1, y, weighed, bound, deltas, before, finite), None

    first = jnp.zeros(1, jnp.int32)
    before = jnp.empty((batch, count, inputs, outputs), slow.dtype).at[:, 0].set(0)
    weighed = jnp.empty((batch, chunk, outputs), slow.dtype)
    bound = jnp.empty((batch, columns, chunk // TILE), wide)
    begin = tell(first, before, slow, weighed, bound)
    deltas = jnp.zeros((batch, inputs, outputs), wide)
    finite = jnp.ones((batch, columns, count), jnp.int32)
    carry = first, *begin, deltas, before, finite
    (_, y, *_, deltas, before, finite), _ = jax.lax.scan(step, carry, length=count - 1)
    return y, deltas, jnp.all(finite > 0, 1), before


def unlearn(
    tokens: Tokens,
    y: Float[Array, "B T O"],
    before: Float[Array, "B N I O"],
    d_y: Float[Array, "B T O"],
    d_deltas: Float[Array, "B I O"],
    *,
    interpret: bool,
) -> Slopes:
    """As `continuum.unlearn`."""
    batch, count, inputs, outputs = before.shape
    chunk, columns = y.shape[1] // count, outputs // TILE

    def charge(n, deltas, answers, taught, weighed, write, d_read):
        given = {
            "n": (n, _number()),
            "tokens": (tokens, _tokens(tokens)),
            "y": (y, _see(y, None, COLUMN)),
            "deltas": (deltas, _see(deltas, None, None, COLUMN)),
        }
        left = {
            "answers": (answers, _see(answers, None, COLUMN)),
            "taught": (taught, _see(taught, None, COLUMN)),
            "weighed": (weighed, _see(weighed, None, COLUMN)),
            "write": (write, _own(write)),
            "d_read": (d_read, _see(d_read, None, COLUMN)),
        }
        grid = columns, chunk // TILE, batch
        return _launch(_charge_kernel, "continuum_charge", chunk, grid, given, left, interpret)

    def undo(n, d_read, d_state, deltas, decay):
        given = {
            "n": (n, _number()),
            "hidden": (tokens.hidden, _see(tokens.hidden, None, ROW)),
            "decays": (tokens.decay, _see(tokens.decay)),
            "before": (before, _see(before, None, ROW, COLUMN)),
            "d_read": (d_read, _see(d_read, None, COLUMN)),
        }
        one = pl.BlockSpec((None, None, None, count), lambda o, r, b: (b, o, r, 0))
        left = {
            "d_state": (d_state, _see(d_state, ROW, COLUMN)),
            "deltas": (deltas, _see(deltas, None, ROW, COLUMN)),
            "decay": (decay, one),
        }
        grid = columns, inputs // TILE, batch
        return _launch(_undo_kernel, "continuum_undo", chunk, grid, given, left, interpret)

    def step(carry, _):
        n, answers, taught, weighed, write, d_read, d_state, deltas, decay = carry
        d_state, deltas, decay = undo(n, d_read, d_state, deltas, decay)
        left = charge(n - 1, deltas, answers, taught, weighed, write, d_read)
        return (n - 1, *left, d_state, deltas, decay), None

    empty = partial(jnp.empty, dtype=y.dtype)
    last = jnp.full(1, count - 1, jnp.int32)
    deltas = empty(before.shape).at[:, -1].set(d_deltas.astype(y.dtype))
    write = jnp.empty((batch, columns, y.shape[1]), d_deltas.dtype)
    left = d_y, empty(y.shape), empty(y.shape), write, empty((batch, chunk, outputs))
    decay = jnp.zeros((batch, columns, inputs // TILE, count), d_deltas.dtype)
    carry = last, *charge(last, deltas, *left), d_deltas, deltas, decay
    (_, answers, taught, weighed, write, _, _, deltas, decay), _ = jax.lax.scan(
        step, carry, length=count - 1
    )
    decay = decay.reshape(batch, -1, count)
    return Slopes(answers, taught, weighed, write, decay, deltas)


def _launch(kernel, name, chunk, grid, given, left, interpret):
    """Runs a kernel on arrays beside their blocks; it goes on with what the last one left."""
    arrays, specs = zip(*given.values(), strict=True)
    carried, places = zip(*left.values(), strict=True)
    first = len(jax.tree.leaves(arrays))
    return pl.pallas_call(
        partial(kernel, chunk),
        out_shape=carried,
        grid=grid,
        in_specs=[*specs, *places],
        out_specs=places,
        input_output_aliases={first + place: place for place in range(len(carried))},
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=STAGES),
        interpret=interpret,
        name=name,
    )(*arrays, *carried)


def _tell_kernel(chunk, number, tokens, size, before, slow, _weighed, _bound, y, weighed, bound):
    """Answers some tokens of a chunk."""
    place, rows = _place(number, chunk)
    n, read = number[0], tokens.read[rows]
    fast = _product(tokens.hidden, rows, lambda part: before[n, part, :], read)
    told = (slow[rows, :] + read[:, None] * fast).astype(y.dtype)
    y[rows, :] = told
    taught = taught_by(tokens, rows, told)
    weighed[place, :] = weighed_of(tokens, rows, taught)
    bound[pl.program_id(1)] = jnp.sum(jnp.sum(jnp.abs(taught), 1) * size[rows])


def _move_kernel(
    chunk, number, hidden, decay, stay, weighed, bound, state, _before, _finite,
    after, before, finite,
):  # fmt: skip
    """Moves some deltas after a chunk."""
    n = number[0]
    moves = jnp.sum(bound[...]) + jnp.abs(decay[n]) < jnp.inf
    old = state[...]
    new = decay[n] * old - _summed(hidden, weighed, n * chunk, old)
    new = jnp.where(moves, new, jnp.where(stay[n] > 0, old, 0))
    after[...] = new
    before[n + 1] = new.astype(before.dtype)
    finite[n] = moves.astype(jnp.int32)


def _charge_kernel(
    chunk, number, tokens, y, deltas, d_y, _taught, _weighed, _write, _d_read,
    answers, taught, weighed, write, d_read,
):  # fmt: skip
    """Finds what is asked of some answers of a chunk, given the gradient of the deltas after it."""
    place, rows = _place(number, chunk)
    n, share = number[0], tokens.write[rows]
    after = _product(tokens.hidden, rows, lambda part: deltas[n, part, :], share)
    error = taught_by(tokens, rows, y[rows, :])
    weighed[rows, :] = weighed_of(tokens, rows, error)
    write[rows] = -jnp.sum(error * after, 1)
    d_taught = -share[:, None] * after
    taught[rows, :] = d_taught.astype(taught.dtype)
    d_answer = (d_y[rows, :] + d_taught).astype(answers.dtype)
    answers[rows, :] = d_answer
    d_read[place, :] = (tokens.read[rows][:, None] * d_answer).astype(d_read.dtype)


def _undo_kernel(
    chunk, number, hidden, decay, before, d_read, d_after, _deltas, _slope, d_state, deltas, slope
):
    """Hands the gradient of some deltas back through a chunk."""
    n, d_old = number[0], d_after[...]
    slope[n] = jnp.sum(d_old * before[n])
    d_new = decay[n] * d_old + _summed(hidden, d_read, n * chunk, d_old)
    d_state[...] = d_new
    deltas[n - 1] = d_new.astype(deltas.dtype)


def _place(number, chunk):
    """Which tokens of the chunk, and of all, a program has."""
    first = pl.program_id(1) * TILE
    return pl.ds(first, TILE), pl.ds(number[0] * chunk + first, TILE)


def _product(hidden, rows, matrix, shares):
    """Tokens times a matrix; zero where all have no share in it."""

    def step(k, total):
        part = pl.ds(k * STEP, STEP)
        return total + dot(hidden[rows, part], matrix(part), total.dtype)

    asked = jnp.max(jnp.abs(shares)) > 0
    steps = asked.astype(jnp.int32) * (hidden.shape[1] // STEP)
    return jax.lax.fori_loop(0, steps, step, jnp.zeros((TILE, TILE), shares.dtype))


def _summed(hidden, array, first, like):
    """Sums products of inputs and rows over a chunk."""

    def step(k, total):
        inputs = hidden[pl.ds(first + k * STEP, STEP), :]
        return total + dot(inputs.T, array[pl.ds(k * STEP, STEP), :], like.dtype)

    return jax.lax.fori_loop(0, array.shape[0] // STEP, step, jnp.zeros_like(like))


def _number():
    return pl.BlockSpec((1,), lambda *_: (0,))


def _tokens(tokens):
    return Tokens(
        _see(tokens.hidden),
        _see(tokens.wanted, None, COLUMN),
        _see(tokens.read),
        _see(tokens.write),
        _see(tokens.decay),
    )


def _see(array, *tiled):
    """One row of the batch; of axes that are tiled, by an axis of the grid, one tile."""
    tiled = tiled or (None,) * (array.ndim - 1)
    shape = [
        size if axis is None else TILE for size, axis in zip(array.shape[1:], tiled, strict=True)
    ]

    def place(*grid):
        return grid[BATCH], *(0 if axis is None else grid[axis] for axis in tiled)

    return pl.BlockSpec((None, *shape), place)


def _own(array):
    """What columns of one row have for themselves: `[B, P, N]` is seen as `[N]`."""
    return pl.BlockSpec((None, None, array.shape[2]), lambda o, _r, b: (b, o, 0))
