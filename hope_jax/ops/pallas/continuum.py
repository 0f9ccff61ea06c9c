"""Runs a linear level that learns in context through a sequence on a GPU, through Triton.

The columns of its matrix learn apart from each other: forward and backward, one program for each
row and block of columns goes through all chunks with its deltas, or their gradient, in registers,
and does there what the next chunk waits for. Both are written once for each chunk, in the type of
the tokens; the other gradients follow from them, for all chunks side by side.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Bool, Float

PLATFORM = "gpu"
COLUMNS, WARPS = 32, 4
"""Of the matrix, that a program has where they are sequential, and its warps."""
ROWS, STEP, ROW_WARPS = 128, 32, 4
"""Rows of it that a program has where chunks lie side by side, columns at a time, and its warps."""
STAGES = 2
LONGEST = 64
"""Tokens of a chunk that registers hold."""
SIZES = (16, 32, 64, 128, 256)
"""Inputs whose deltas they hold beside."""


class Tokens(NamedTuple):
    """What a level reads, and what moves do with it; whole chunks.

    Attributes:
      hidden: The inputs h.
      values: What should have been answered one token before.
      read: Whether what a chunk began with is added to the answer.
      write: A pair's share in the move after its chunk; zero where a token is the key of none.
      decay: What the deltas keep at the move after a chunk.
    """

    hidden: Float[Array, "B T I"]
    values: Float[Array, "B T O"]
    read: Float[Array, "B T"]
    write: Float[Array, "B T"]
    decay: Float[Array, "B N"]


def refusal(chunk: int, time: int, inputs: int, outputs: int) -> str | None:
    """Says why the kernels do not take a call, or None if they do.

    Args:
      chunk: Tokens of a chunk.
      time: Tokens.
      inputs: Rows of the matrix.
      outputs: Its columns.
    """
    if time < 2 * chunk:
        return f"the kernels take two chunks or more, got {time} tokens"
    if not 16 <= chunk <= LONGEST or chunk & (chunk - 1):
        return f"the kernels take chunks of a power of two from 16 to {LONGEST}, got {chunk}"
    if inputs not in SIZES or (outputs % LONGEST and outputs not in SIZES):
        return (
            f"the kernels take {', '.join(map(str, SIZES))} inputs and as many outputs or a "
            f"multiple of {LONGEST}, got {inputs} and {outputs}"
        )
    return None


def answer(
    tokens: Tokens,
    weight: Float[Array, "I O"],
    size: Float[Array, "B T"],
    stay: Float[Array, "B N"],
    *,
    keep: bool,
    interpret: bool,
) -> tuple[
    Float[Array, "B T O"], Float[Array, "B I O"], Bool[Array, "B N"], Float[Array, "B N I O"] | None
]:
    """Reads tokens with deltas that move after every chunk, from zero.

    Equivalent to, for each chunk:

        y = h weight + read (h D)
        D <- decay D - h^T (write (y - the next token's values))

    Args:
      tokens: What is read.
      weight: The slow weights, in the type of the tokens.
      size: No less than any number of a token in `write h^T`.
      stay: What the deltas keep at a move that is left out because it is not finite.
      keep: Whether to return what the deltas were as chunks began.
      interpret: Whether to interpret the kernel instead of compiling it.

    Returns:
      The answers; the deltas after the last chunk; whether moves were finite in all columns; the
      deltas as chunks began, in the type of the tokens, or None.
    """
    (batch, time, inputs), outputs, count = tokens.hidden.shape, weight.shape[1], stay.shape[1]
    width, dtype = min(COLUMNS, outputs), tokens.hidden.dtype
    grid = outputs // width, batch
    wide = jnp.promote_types(dtype, jnp.float32)
    out = (
        jax.ShapeDtypeStruct((batch, time, outputs), dtype),
        jax.ShapeDtypeStruct((batch, inputs, outputs), wide),
        jax.ShapeDtypeStruct((batch, grid[0], count), jnp.int32),
    )
    places = _columns(out[0], width), _columns(out[1], width), _block(out[2])
    if keep:
        out = *out, jax.ShapeDtypeStruct((batch, count, inputs, outputs), dtype)
        places = *places, _deltas(out[3], width)
    y, deltas, finite, *before = pl.pallas_call(
        partial(_answer_kernel, time // count),
        out_shape=out,
        grid=grid,
        in_specs=[
            _tokens(tokens, width),
            pl.BlockSpec((inputs, width), lambda o, _b: (0, o)),
            _row(size),
            _row(stay),
        ],
        out_specs=places,
        name="continuum_answer",
        **_how(WARPS, interpret),
    )(tokens, weight, size, stay)
    return y, deltas, jnp.all(finite > 0, 1), before[0] if keep else None


def unlearn(
    tokens: Tokens,
    d_y: Float[Array, "B T O"],
    d_deltas: Float[Array, "B I O"],
    *,
    interpret: bool,
) -> tuple[Float[Array, "B T O"], Float[Array, "B T O"], Float[Array, "B N I O"]]:
    """Hands the gradient of the deltas back from chunk to chunk.

    Args:
      tokens: What was read; not the values.
      d_y: The gradient of the answers.
      d_deltas: That of the deltas after the last chunk.
      interpret: As for `answer`.

    Returns:
      Gradients in the type of the tokens: of the answers before any of them were taught; of what is
      taught, `answer - values`, a part of the former; of the deltas after each chunk.
    """
    (batch, time, outputs), (inputs, count) = d_y.shape, (d_deltas.shape[1], tokens.decay.shape[1])
    width = min(COLUMNS, outputs)
    like = jax.ShapeDtypeStruct(d_y.shape, d_y.dtype)
    deltas = jax.ShapeDtypeStruct((batch, count, inputs, outputs), d_y.dtype)
    token = _columns(like, width)
    return pl.pallas_call(
        partial(_unlearn_kernel, time // count),
        out_shape=(like, like, deltas),
        grid=(outputs // width, batch),
        in_specs=[_tokens(tokens, width), token, _columns(d_deltas, width)],
        out_specs=(token, token, _deltas(deltas, width)),
        name="continuum_unlearn",
        **_how(WARPS, interpret),
    )(tokens, d_y, d_deltas)


def charge(
    tokens: Tokens,
    weight: Float[Array, "I O"],
    y: Float[Array, "B T O"],
    before: Float[Array, "B N I O"],
    d_answer: Float[Array, "B T O"],
    d_after: Float[Array, "B N I O"],
    *,
    interpret: bool,
) -> tuple[Float[Array, "B T I"], Float[Array, "B T"], Float[Array, "B N"]]:
    """Finds the gradients of inputs, of shares in moves and of decays.

    Args:
      tokens: What was read; whether what a chunk began with was, is one or zero.
      weight: As for `answer`.
      y: The answers.
      before: The deltas as chunks began.
      d_answer: The gradient of the answers before any of them were taught.
      d_after: That of the deltas after each chunk.
      interpret: As for `answer`.
    """
    batch, count, inputs, outputs = before.shape
    chunk, high = y.shape[1] // count, min(ROWS, inputs)
    grid = inputs // high, count, batch
    wide = tokens.write.dtype

    def token(array, *, tiled=False) -> Any:
        shape = None, chunk, high if tiled else array.shape[-1]
        return pl.BlockSpec(shape, lambda i, n, b: (b, n, i if tiled else 0))

    def row(array) -> Any:
        return pl.BlockSpec((None, array.shape[1]), lambda _i, _n, b: (b, 0))

    slow = pl.BlockSpec((high, outputs), lambda i, _n, _b: (i, 0))
    deltas = pl.BlockSpec((None, None, high, outputs), lambda i, n, b: (b, n, i, 0))
    specs = Tokens(
        token(tokens.hidden, tiled=True), token(y), *(row(array) for array in tokens[2:])
    )
    out = (
        jax.ShapeDtypeStruct(tokens.hidden.shape, y.dtype),
        jax.ShapeDtypeStruct((batch, grid[0], y.shape[1]), wide),
        jax.ShapeDtypeStruct((batch, grid[0], count), wide),
    )
    own = pl.BlockSpec((None, None, chunk), lambda i, n, b: (b, i, n))
    one = pl.BlockSpec((None, None, count), lambda i, _n, b: (b, i, 0))
    hidden, write, decay = pl.pallas_call(
        _charge_kernel,
        out_shape=out,
        grid=grid,
        in_specs=[specs, slow, token(y), deltas, token(d_answer), deltas],
        out_specs=(token(tokens.hidden, tiled=True), own, one),
        name="continuum_charge",
        **_how(ROW_WARPS, interpret),
    )(tokens, weight, y, before, d_answer, d_after)
    return hidden, jnp.sum(write, 1), jnp.sum(decay, 1)


def _answer_kernel(chunk, tokens, weight, size, stay, y, deltas, finite, *before):
    theta = weight[...]

    def step(n, state, *, careful):
        rows = pl.ds(n * chunk, chunk)
        hidden = tokens.hidden[rows, :]
        kept = state.astype(hidden.dtype)
        for place in before:
            place[n] = kept
        fast = tokens.read[rows][:, None] * _dot(hidden, kept, state.dtype)
        told = (_dot(hidden, theta, state.dtype) + fast).astype(y.dtype)
        y[rows, :] = told
        wanted = _next(tokens.values, n * chunk, told.shape)
        taught = _taught_by(tokens, rows, told, wanted)
        weighed = (tokens.write[rows][:, None] * taught).astype(hidden.dtype)
        new = tokens.decay[n] * state - _dot(hidden.T, weighed, state.dtype)
        if not careful:
            return new
        largest = jnp.sum(jnp.abs(taught), 1) * size[rows]
        moves = jnp.sum(largest) + jnp.abs(tokens.decay[n]) < jnp.inf
        finite[n] = moves.astype(jnp.int32)
        return jnp.where(moves, new, jnp.where(stay[n] > 0, state, 0))

    def read(*, careful):
        zero = jnp.zeros(deltas.shape, deltas.dtype)
        return jax.lax.fori_loop(0, finite.shape[0], partial(step, careful=careful), zero)

    state = read(careful=False)
    deltas[...] = state
    finite[...] = jnp.ones(finite.shape, finite.dtype)

    # What is not finite stays so: to ask once spares every chunk a sum over the program's threads.
    @pl.when(jnp.logical_not(jnp.sum(jnp.abs(state)) < jnp.inf))
    def _():
        deltas[...] = read(careful=True)


def _unlearn_kernel(chunk, tokens, d_y, d_deltas, d_answer, d_taught, d_after):
    count = d_after.shape[0]

    def step(done, d_state):
        n = count - 1 - done
        rows = pl.ds(n * chunk, chunk)
        hidden, wide = tokens.hidden[rows, :], d_state.dtype
        kept = d_state.astype(hidden.dtype)
        d_after[n] = kept
        asked = -tokens.write[rows][:, None] * _dot(hidden, kept, wide)
        d_taught[rows, :] = asked.astype(d_taught.dtype)
        asked = (d_y[rows, :] + asked).astype(hidden.dtype)
        d_answer[rows, :] = asked
        d_read = (tokens.read[rows][:, None] * asked).astype(hidden.dtype)
        return tokens.decay[n] * d_state + _dot(hidden.T, d_read, wide)

    jax.lax.fori_loop(0, count, step, d_deltas[...])


def _charge_kernel(tokens, weight, y, before, d_answer, d_after, d_hidden, d_write, d_decay):
    n, chunk = pl.program_id(1), y.shape[0]
    rows = pl.ds(n * chunk, chunk)
    size, wide = min(STEP, y.shape[1]), d_write.dtype

    def step(k, sums):
        seen, learned, kept = sums
        part = pl.ds(k * size, size)
        old, new = before[:, part], d_after[:, part]
        wanted = _next(tokens.values, 0, (chunk, size), k * size)
        taught = _taught_by(tokens, rows, y[:, part], wanted).astype(old.dtype)
        asked = d_answer[:, part]
        read = (tokens.read[rows][:, None] * asked).astype(asked.dtype)
        seen = seen + _dot(read, old.T, wide) + _dot(asked, weight[:, part].T, wide)
        learned = learned + _dot(taught, new.T, wide)
        return seen, learned, kept + jnp.sum(old.astype(wide) * new.astype(wide), 1)

    zero = jnp.zeros(d_hidden.shape, wide)
    sums = zero, zero, jnp.zeros(before.shape[0], wide)
    seen, learned, kept = jax.lax.fori_loop(0, y.shape[1] // size, step, sums)
    told = seen - tokens.write[rows][:, None] * learned
    d_hidden[...] = told.astype(d_hidden.dtype)
    d_write[...] = -jnp.sum(tokens.hidden[...].astype(wide) * learned, 1)
    d_decay[n] = jnp.sum(kept)


def _taught_by(tokens: Any, rows: Any, told: Any, wanted: Any) -> Any:
    """By how much answers are wrong; zero where nothing is learned from it."""
    wide = tokens.write.dtype
    error = (told.astype(wide) - wanted.astype(wide)).astype(told.dtype).astype(wide)
    return jnp.where(tokens.write[rows][:, None] != 0, error, 0)


def _next(values: Any, first: Any, shape: tuple[int, int], column: Any = 0) -> Any:
    """What tokens from `first` on should have answered: a row on; of a chunk's last no matter."""
    place = [jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in range(2)]
    return values[jnp.minimum(first + 1 + place[0], values.shape[0] - 1), column + place[1]]


def _dot(a: Any, b: Any, wide: Any) -> Any:
    """A product, summed in a wider type."""
    return jax.lax.dot(a, b, preferred_element_type=wide)


def _tokens(tokens, width):
    hidden: Any = pl.BlockSpec((None, *tokens.hidden.shape[1:]), lambda _o, b: (b, 0, 0))
    return Tokens(
        hidden,
        _columns(tokens.values, width),
        _row(tokens.read),
        _row(tokens.write),
        _row(tokens.decay),
    )


def _columns(array, width) -> Any:
    """A block of columns of one row: `[B, T, O]` is seen as `[T, width]`."""
    return pl.BlockSpec((None, array.shape[1], width), lambda o, b: (b, 0, o))


def _row(array) -> Any:
    return pl.BlockSpec((None, array.shape[1]), lambda _o, b: (b, 0))


def _block(array):
    """What a block of columns of one row has for itself: `[B, P, N]` is seen as `[N]`."""
    return pl.BlockSpec((None, None, array.shape[2]), lambda o, b: (b, o, 0))


def _deltas(array, width):
    return pl.BlockSpec((None, *array.shape[1:3], width), lambda o, b: (b, 0, 0, o))


def _how(warps, interpret):
    params = triton.CompilerParams(num_warps=warps, num_stages=STAGES)
    return {"compiler_params": params, "interpret": interpret}
