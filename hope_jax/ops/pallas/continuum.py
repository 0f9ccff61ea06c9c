"""Runs a linear level that learns in context through a sequence on a GPU, through Triton.

The columns of its matrix learn apart from each other: forward and backward, one program for each
row and block of columns goes through all chunks with its deltas in registers. What else the
backward pass wants of deltas, they are for the products of all chunks at once: written once, in the
type of the tokens. With fewer programs than multiprocessors the rest of the chip idles.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Bool, Float

PLATFORM = "gpu"
COLUMNS = 64
"""Of the matrix, that a program has where they are sequential."""
TILE = 128
"""Rows and columns that a program has of deltas which are already known to move."""
WARPS = 8
LONGEST = 64
"""Tokens of a chunk that registers hold."""
SIZES = (16, 32, 64, 128, 256)
"""Inputs whose deltas they hold beside."""


class Tokens(NamedTuple):
    """What a level reads, and what moves do with it; whole chunks.

    Attributes:
      hidden: The inputs h.
      wanted: What should have been answered.
      read: Whether what a chunk began with is added to the answer.
      write: A pair's share in the move after its chunk; zero where a token is the key of none.
      decay: What the deltas keep at the move after a chunk.
    """

    hidden: Float[Array, "B T I"]
    wanted: Float[Array, "B T O"]
    read: Float[Array, "B T"]
    write: Float[Array, "B T"]
    decay: Float[Array, "B N"]


class Slopes(NamedTuple):
    """Gradients, in the type of the tokens, and float32 where a block of columns has its own share.

    Attributes:
      answers: Of the answers before any of them were taught.
      taught: Of what is taught, `answer - wanted`; a part of the former.
      weighed: What is taught, times its share; no gradient.
      write: Of the shares in moves.
      decay: Of the decays.
      deltas: Of the deltas after each chunk.
    """

    answers: Float[Array, "B T O"]
    taught: Float[Array, "B T O"]
    weighed: Float[Array, "B T O"]
    write: Float[Array, "B P T"]
    decay: Float[Array, "B P N"]
    deltas: Float[Array, "B N I O"]


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
    if inputs not in SIZES or (outputs % TILE and outputs not in SIZES):
        return (
            f"the kernels take {', '.join(map(str, SIZES))} inputs and as many outputs or a "
            f"multiple of {TILE}, got {inputs} and {outputs}"
        )
    return None


def answer(
    tokens: Tokens,
    slow: Float[Array, "B T O"],
    size: Float[Array, "B T"],
    stay: Float[Array, "B N"],
    *,
    interpret: bool,
) -> tuple[Float[Array, "B T O"], Float[Array, "B I O"], Bool[Array, "B N"]]:
    """Reads tokens with deltas that move after every chunk, from zero.

    Equivalent to, for each chunk:

        y = slow + read (h D)
        D <- decay D - h^T (write (y - wanted))

    Args:
      tokens: What is read.
      slow: What the slow weights answer.
      size: No less than any number of a token in `write h^T`.
      stay: What the deltas keep at a move that is left out because it is not finite.
      interpret: Whether to interpret the kernel instead of compiling it.

    Returns:
      The answers; the deltas after the last chunk; whether moves were finite in all columns.
    """
    (batch, time, inputs), outputs, count = tokens.hidden.shape, slow.shape[-1], stay.shape[1]
    width = min(COLUMNS, outputs)
    grid = outputs // width, batch
    wide = jnp.promote_types(slow.dtype, jnp.float32)
    out = (
        jax.ShapeDtypeStruct(slow.shape, slow.dtype),
        jax.ShapeDtypeStruct((batch, inputs, outputs), wide),
        jax.ShapeDtypeStruct((batch, grid[0], count), jnp.int32),
    )
    y, deltas, finite = pl.pallas_call(
        partial(_answer_kernel, time // count),
        out_shape=out,
        grid=grid,
        in_specs=[_tokens(tokens, width), _columns(slow, width), _row(size), _row(stay)],
        out_specs=(_columns(out[0], width), _columns(out[1], width), _block(out[2])),
        name="continuum_answer",
        **_how(interpret),
    )(tokens, slow, size, stay)
    return y, deltas, jnp.all(finite > 0, 1)


def states(tokens: Tokens, y: Float[Array, "B T O"], *, interpret: bool) -> Float[Array, "B N I O"]:
    """Follows the deltas again, given the answers.

    Args:
      tokens: What was read.
      y: The answers.
      interpret: As for `answer`.

    Returns:
      What the deltas were as chunks began, in the type of the tokens.
    """
    (batch, time, inputs), outputs, count = tokens.hidden.shape, y.shape[-1], tokens.decay.shape[1]
    high, width = min(TILE, inputs), min(TILE, outputs)
    out = jax.ShapeDtypeStruct((batch, count, inputs, outputs), y.dtype)

    part = pl.BlockSpec((None, time, width), lambda o, _i, b: (b, 0, o))
    specs = Tokens(
        pl.BlockSpec((None, time, high), lambda _o, i, b: (b, 0, i)),
        part,
        *(
            pl.BlockSpec((None, array.shape[1]), lambda _o, _i, b: (b, 0))
            for array in (tokens.read, tokens.write, tokens.decay)
        ),
    )
    return pl.pallas_call(
        partial(_states_kernel, time // count),
        out_shape=out,
        grid=(outputs // width, inputs // high, batch),
        in_specs=[specs, part],
        out_specs=pl.BlockSpec((None, count, high, width), lambda o, i, b: (b, 0, i, o)),
        name="continuum_states",
        **_how(interpret),
    )(tokens, y)


def unlearn(
    tokens: Tokens,
    y: Float[Array, "B T O"],
    before: Float[Array, "B N I O"],
    d_y: Float[Array, "B T O"],
    d_deltas: Float[Array, "B I O"],
    *,
    interpret: bool,
) -> Slopes:
    """Hands gradients back through the chunks.

    Args:
      tokens: What was read.
      y: The answers.
      before: The deltas as chunks began.
      d_y: The gradient of the answers.
      d_deltas: That of the deltas after the last chunk.
      interpret: As for `answer`.
    """
    batch, count, inputs, outputs = before.shape
    time, width = y.shape[1], min(COLUMNS, outputs)
    grid = outputs // width, batch
    like = jax.ShapeDtypeStruct(y.shape, y.dtype)
    out = Slopes(
        *(like, like, like),
        jax.ShapeDtypeStruct((batch, grid[0], time), d_deltas.dtype),
        jax.ShapeDtypeStruct((batch, grid[0], count), d_deltas.dtype),
        jax.ShapeDtypeStruct(before.shape, before.dtype),
    )
    many = pl.BlockSpec((None, count, inputs, width), lambda o, b: (b, 0, 0, o))
    token = _columns(like, width)
    return pl.pallas_call(
        partial(_unlearn_kernel, time // count),
        out_shape=out,
        grid=grid,
        in_specs=[_tokens(tokens, width), token, many, token, _columns(d_deltas, width)],
        out_specs=Slopes(token, token, token, _block(out.write), _block(out.decay), many),
        name="continuum_unlearn",
        **_how(interpret),
    )(tokens, y, before, d_y, d_deltas)


def _answer_kernel(chunk, tokens, slow, size, stay, y, deltas, finite):
    def step(n, state):
        rows = pl.ds(n * chunk, chunk)
        hidden = tokens.hidden[rows, :]
        fast = _dot(hidden, state.astype(hidden.dtype), state.dtype)
        told = (slow[rows, :] + tokens.read[rows][:, None] * fast).astype(y.dtype)
        y[rows, :] = told
        taught = _taught_by(tokens, rows, told)
        largest = jnp.sum(jnp.abs(taught), 1) * size[rows]
        moves = jnp.sum(largest) + jnp.abs(tokens.decay[n]) < jnp.inf
        finite[n] = moves.astype(jnp.int32)
        move = _dot(hidden.T, _weighed_of(tokens, rows, taught), state.dtype)
        kept = jnp.where(stay[n] > 0, state, 0)
        return jnp.where(moves, tokens.decay[n] * state - move, kept)

    deltas[...] = jax.lax.fori_loop(0, finite.shape[0], step, jnp.zeros(deltas.shape, deltas.dtype))


def _states_kernel(chunk, tokens, y, before):
    wide = jnp.promote_types(y.dtype, jnp.float32)

    def step(n, state):
        before[n] = state.astype(before.dtype)
        rows = pl.ds(n * chunk, chunk)
        weighed = _weighed_of(tokens, rows, _taught_by(tokens, rows, y[rows, :]))
        return tokens.decay[n] * state - _dot(tokens.hidden[rows, :].T, weighed, wide)

    jax.lax.fori_loop(0, before.shape[0], step, jnp.zeros(before.shape[1:], wide))


def _unlearn_kernel(chunk, tokens, y, before, d_y, d_deltas, *slopes):
    slopes, count = Slopes(*slopes), before.shape[0]

    def step(done, d_state):
        n = count - 1 - done
        rows = pl.ds(n * chunk, chunk)
        hidden, wide = tokens.hidden[rows, :], d_state.dtype
        d_after = d_state.astype(hidden.dtype)
        slopes.deltas[n] = d_after
        slopes.decay[n] = jnp.sum(d_state * before[n])
        d_weighed = -_dot(hidden, d_after, wide)
        taught = _taught_by(tokens, rows, y[rows, :])
        slopes.weighed[rows, :] = _weighed_of(tokens, rows, taught)
        slopes.write[rows] = jnp.sum(taught * d_weighed, 1)
        d_taught = tokens.write[rows][:, None] * d_weighed
        slopes.taught[rows, :] = d_taught.astype(slopes.taught.dtype)
        d_answer = (d_y[rows, :] + d_taught).astype(hidden.dtype)
        slopes.answers[rows, :] = d_answer
        d_read = (tokens.read[rows][:, None] * d_answer).astype(hidden.dtype)
        return tokens.decay[n] * d_state + _dot(hidden.T, d_read, wide)

    jax.lax.fori_loop(0, count, step, d_deltas[...])


def _taught_by(tokens: Any, rows: Any, told: Any) -> Any:
    """By how much answers are wrong, in a kernel; zero where nothing is learned from it."""
    wide = tokens.write.dtype
    error = told.astype(wide) - tokens.wanted[rows, :].astype(wide)
    error = error.astype(told.dtype).astype(wide)
    return jnp.where(tokens.write[rows][:, None] != 0, error, 0)


def _weighed_of(tokens: Any, rows: Any, taught: Any) -> Any:
    """What is taught, times its share in the move."""
    return (tokens.write[rows][:, None] * taught).astype(tokens.wanted.dtype)


def _dot(a: Any, b: Any, wide: Any) -> Any:
    """A product, summed in a wider type."""
    return jax.lax.dot(a, b, preferred_element_type=wide)


def _tokens(tokens, width):
    return Tokens(
        pl.BlockSpec((None, *tokens.hidden.shape[1:]), lambda _o, b: (b, 0, 0)),
        _columns(tokens.wanted, width),
        _row(tokens.read),
        _row(tokens.write),
        _row(tokens.decay),
    )


def _columns(array, width):
    """A block of columns of one row: `[B, T, O]` is seen as `[T, width]`."""
    return pl.BlockSpec((None, array.shape[1], width), lambda o, b: (b, 0, o))


def _row(array):
    return pl.BlockSpec((None, array.shape[1]), lambda _o, b: (b, 0))


def _block(array):
    """What a block of columns of one row has for itself: `[B, P, N]` is seen as `[N]`."""
    return pl.BlockSpec((None, None, array.shape[2]), lambda o, b: (b, o, 0))


def _how(interpret):
    params = triton.CompilerParams(num_warps=WARPS, num_stages=2)
    return {"compiler_params": params, "interpret": interpret}
