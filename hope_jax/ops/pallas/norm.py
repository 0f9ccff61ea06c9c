"""Norms of rows on a GPU, through Triton: a sum before them or a gate behind them costs no pass.

A program has whole rows in registers, so that what is read for their mean squares is there for what
follows. Backward it goes through `BLOCKS` times as many, and adds up what they owe to the scale.

    add_norm               two arrays read, two written; of one part, one and one
    add_norm_backward      three read, one written
    gated_norm             two read, one written
    gated_norm_backward    three read, two written

With at most 25 FLOPs and one exponential a number, all are bound by memory.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

BLOCK, BLOCKS = 2048, 16
"""Numbers of an array that a program has at once, where a row has no more, and how often."""


def refusal(features: int, dtype: jnp.dtype) -> str | None:
    """Says why the kernels do not take such rows, or None if they do."""
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"the kernels take bfloat16 and float32, got {dtype}"
    odd = features % 128 and features & (features - 1)
    if odd or not 64 <= features <= 4096:
        return (
            "the kernels take 64 to 4096 features, a power of two or a multiple of 128, "
            f"got {features}"
        )
    return None


def add_norm(
    parts: tuple[Float[Array, "N D"], ...],
    scale: Float[Array, " D"],
    epsilon: float,
    *,
    interpret: bool,
) -> tuple[Float[Array, "N D"], Float[Array, "N D"]]:
    """Normalizes the rows of a sum.

    Args:
      parts: One array, or two to be added.
      scale: What normalized rows are multiplied by.
      epsilon: What is added to mean squares.
      interpret: Whether to interpret the kernel instead of compiling it.

    Returns:
      The sum, and its norm.
    """
    kernel = partial(_add_norm_kernel, epsilon, len(parts))
    call = _forward(kernel, "add_norm", len(parts), parts[0], interpret)
    *total, normed = call(*parts, scale)
    return total[0] if total else parts[0], normed


def _add_norm_kernel(epsilon, count, *refs):
    (*parts, scale), (*total, normed) = refs[: count + 1], refs[count + 1 :]
    place = _place(normed, pl.program_id(0))
    x = _read(parts[0], place)
    for part in parts[1:]:
        x += _read(part, place)
    for out in total:
        _write(out, place, x)
        x = x.astype(out.dtype).astype(jnp.float32)
    _write(normed, place, x * _inverse(x, epsilon, normed.shape[1]) * _vector(scale, place))


def add_norm_backward(
    total: Float[Array, "N D"],
    scale: Float[Array, " D"],
    slopes: tuple[Float[Array, "N D"], Float[Array, "N D"]],
    epsilon: float,
    *,
    interpret: bool,
) -> tuple[Float[Array, "N D"], Float[Array, " D"]]:
    """Returns the gradients of each part of the sum, which are one, and of the scale.

    Args:
      total: The sum.
      scale: As for `add_norm`.
      slopes: The gradients of the sum and of its norm.
      epsilon: As for `add_norm`.
      interpret: As for `add_norm`.
    """
    kernel = partial(_add_norm_backward_kernel, epsilon)
    slope, owed = _backward(kernel, "add_norm_backward", 1, total, interpret)(total, *slopes, scale)
    return slope, jnp.sum(owed, 0).astype(scale.dtype)


def _add_norm_backward_kernel(epsilon, total, to_total, to_normed, scale, slope, owed):
    def block(place):
        x, push = _read(total, place), _read(to_normed, place)
        back, unit = _unscale(x, push * _vector(scale, place), epsilon, total.shape[1])
        _write(slope, place, _read(to_total, place) + back)
        return push * unit

    _walk(block, total, owed)


def gated_norm(
    y: Float[Array, "N D"],
    gate: Float[Array, "T P E"],
    scale: Float[Array, " D"],
    epsilon: float,
    *,
    interpret: bool,
) -> Float[Array, "N D"]:
    """Normalizes rows and multiplies them by the SiLU of a gate.

    Args:
      y: The rows, E / D for each token.
      gate: Before its SiLU; the last of the parts, the others are not read.
      scale: As for `add_norm`.
      epsilon: As for `add_norm`.
      interpret: As for `add_norm`.
    """
    call = _forward(partial(_gated_norm_kernel, epsilon), "gated_norm", 1, y, interpret)
    return call(y, gate, scale)[0]


def _gated_norm_kernel(epsilon, y, gate, scale, out):
    place = _place(y, pl.program_id(0))
    x, z = _read(y, place), _read_last(gate, y, place)
    normed = x * _inverse(x, epsilon, y.shape[1]) * _vector(scale, place)
    _write(out, place, normed * z * jax.nn.sigmoid(z))


def gated_norm_backward(
    y: Float[Array, "N D"],
    gate: Float[Array, "T P E"],
    scale: Float[Array, " D"],
    slope: Float[Array, "N D"],
    epsilon: float,
    *,
    interpret: bool,
) -> tuple[Float[Array, "N D"], Float[Array, "N D"], Float[Array, " D"]]:
    """Returns the gradients of y, the last part of gate and scale.

    Args:
      y: As for `gated_norm`.
      gate: As there.
      scale: As there.
      slope: The gradient of the answer.
      epsilon: As there.
      interpret: As there.
    """
    kernel = partial(_gated_norm_backward_kernel, epsilon)
    call = _backward(kernel, "gated_norm_backward", 2, y, interpret)
    to_y, to_gate, owed = call(y, gate, slope, scale)
    return to_y, to_gate, jnp.sum(owed, 0).astype(scale.dtype)


def _gated_norm_backward_kernel(epsilon, y, gate, slope, scale, to_y, to_gate, owed):
    def block(place):
        x, z, push = _read(y, place), _read_last(gate, y, place), _read(slope, place)
        weight, share = _vector(scale, place), jax.nn.sigmoid(z)
        to_normed = push * z * share
        back, unit = _unscale(x, to_normed * weight, epsilon, y.shape[1])
        _write(to_y, place, back)
        _write(to_gate, place, push * unit * weight * share * (1 + z * (1 - share)))
        return to_normed * unit

    _walk(block, y, owed)


def _unscale(x, push, epsilon, features):
    """The gradient of rows for one of what they are divided into, and the latter."""
    inverse = _inverse(x, epsilon, features)
    unit = x * inverse
    along = jnp.sum(push * unit, axis=1, keepdims=True) / features
    return inverse * (push - unit * along), unit


def _inverse(x, epsilon, features):
    return jax.lax.rsqrt(jnp.sum(x * x, axis=1, keepdims=True) / features + epsilon)


def _walk(block: Callable[[tuple], Array], like, owed):
    """Calls `block` for all rows of a program, and writes the sum of what it returns."""
    program, features = pl.program_id(0), like.shape[1]
    total = jnp.zeros((_rows(features), pl.next_power_of_2(features)), jnp.float32)

    def step(i, total):
        return total + block(_place(like, program * BLOCKS + i))

    total = jnp.sum(jax.lax.fori_loop(0, BLOCKS, step, total), axis=0)
    columns = jnp.arange(total.size)
    triton.store(owed.at[program, columns], total, mask=columns < features)


def _place(like, number):
    """Rows and columns of a block of rows, and which of them there are."""
    count, features = like.shape
    shape = _rows(features), pl.next_power_of_2(features)
    row = number * shape[0] + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    column = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return row, column, (row < count) & (column < features)


def _read(ref, place):
    row, column, there = place
    return triton.load(ref.at[row, column], mask=there, other=0).astype(jnp.float32)


def _read_last(ref, like, place):
    """Of the last part of each token; its features are those of several rows."""
    row, column, there = place
    _, parts, features = ref.shape
    width = like.shape[1]
    rows = features // width
    where = ref.at[row // rows, parts - 1, row % rows * width + column]
    return triton.load(where, mask=there, other=0).astype(jnp.float32)


def _write(ref, place, value):
    row, column, there = place
    triton.store(ref.at[row, column], value.astype(ref.dtype), mask=there)


def _vector(ref, place):
    _, column, _ = place
    there = column < ref.shape[0]
    return triton.load(ref.at[column], mask=there, other=0).astype(jnp.float32)


def _forward(kernel, name, outputs, like, interpret):
    outs = (jax.ShapeDtypeStruct(like.shape, like.dtype),) * outputs
    return _call(kernel, name, outs, like, _rows(like.shape[1]), interpret)


def _backward(kernel, name, outputs, like, interpret):
    count, features = like.shape
    span = BLOCKS * _rows(features)
    outs = (jax.ShapeDtypeStruct(like.shape, like.dtype),) * outputs
    owed = jax.ShapeDtypeStruct((pl.cdiv(count, span), features), jnp.float32)
    return _call(kernel, name, (*outs, owed), like, span, interpret)


def _call(kernel, name, outs, like, span, interpret):
    width = pl.next_power_of_2(like.shape[1])
    return pl.pallas_call(
        kernel,
        out_shape=outs,
        grid=pl.cdiv(like.shape[0], span),
        interpret=interpret,
        name=name,
        compiler_params=triton.CompilerParams(num_warps=max(BLOCK, width) // 512, num_stages=1),
    )


def _rows(features):
    return max(1, BLOCK // pl.next_power_of_2(features))
