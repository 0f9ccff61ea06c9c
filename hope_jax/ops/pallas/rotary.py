"""Rotary embedding on a GPU, through Triton: each number is moved once, where it is wanted.

Forward, queries and keys that one product has found side by side come apart as they are turned.
Backward, the gradients of queries, keys and values are laid side by side as they are turned back,
for one product of all. XLA pads and adds them, twice in two layouts.

Two numbers are moved for each and 3 FLOPs computed: at 2 bytes, 32 x 4,096 tokens with 3 x 1,024
features take an H100 (3.35 TB/s) at least 0.32 ms forward and 0.48 ms backward.
"""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

FORWARD, BACKWARD, HEADS = 4096, 2048, 16
"""The most numbers of a program, if it has more than one token, and the most heads."""


def refusal(width: int) -> str | None:
    """Says why the kernels do not take heads of so many features, or None if they do."""
    if width & (width - 1) or not 16 <= width <= 256:
        return f"the kernels take heads of 16 to 256 features, a power of two, got {width}"
    return None


def turn(
    joined: Float[Array, "B T N K"],
    cos: Float[Array, "T half_width"],
    sin: Float[Array, "T half_width"],
    heads: int,
    *,
    interpret: bool,
) -> tuple[Float[Array, "B T H K"], Float[Array, "B T G K"]]:
    """Turns feature pairs (i, i + K/2), and takes queries and keys apart.

    Args:
      joined: The heads of queries, behind them those of keys.
      cos: Of the angles by which each token's pairs turn.
      sin: Of these angles.
      heads: Heads of queries.
      interpret: Whether to interpret the kernel instead of compiling it.
    """
    batch, time, count, width = joined.shape
    counts = heads, count - heads
    out = tuple(_like(joined, (batch, time, n, width)) for n in counts)
    parts = _launch(_turn_kernel, "rotary", FORWARD, out, interpret, counts, (joined,), cos, sin)
    return tuple(x.reshape(like.shape) for x, like in zip(parts, out, strict=True))


def turn_back(
    parts: tuple[Float[Array, "B T H K"], Float[Array, "B T G K"], Float[Array, "B T G K"]],
    cos: Float[Array, "T half_width"],
    sin: Float[Array, "T half_width"],
    *,
    interpret: bool,
) -> Float[Array, "B T N K"]:
    """Turns queries and keys back, and lays them and the values side by side.

    Args:
      parts: Queries, keys and values, or rather their gradients.
      cos: As for `turn`.
      sin: As there.
      interpret: As there.
    """
    batch, time, _, width = parts[0].shape
    counts = tuple(part.shape[2] for part in parts)
    out = (_like(parts[0], (batch, time, sum(counts), width)),)
    (joined,) = _launch(
        _turn_back_kernel, "rotary_backward", BACKWARD, out, interpret, counts, parts, cos, sin
    )
    return joined.reshape(out[0].shape)


def _turn_kernel(time, counts, rows, size, joined, cos, sin, *outs):
    cosine, sine = _angles(time, rows, cos, sin)

    def move(part, here, there):
        first, second = (_read(joined, here, half) for half in (0, 1))
        _write(outs[part], there, first * cosine - second * sine, second * cosine + first * sine)

    _by_part(counts, rows, size, move)


def _turn_back_kernel(time, counts, rows, size, *refs):
    *parts, cos, sin, joined = refs
    cosine, sine = _angles(time, rows, cos, sin)

    def move(part, there, here):
        first, second = (_read(parts[part], here, half) for half in (0, 1))
        if part < 2:
            first, second = first * cosine + second * sine, second * cosine - first * sine
        _write(joined, there, first, second)

    _by_part(counts, rows, size, move)


def _by_part(counts, rows, size, move):
    """Calls `move` with a part, and a program's place among all heads and among that part's."""
    tokens, block = pl.ds(pl.program_id(0) * rows, rows), pl.program_id(1)
    ends = list(itertools.accumulate(count // size for count in counts))
    for part, (begin, end) in enumerate(itertools.pairwise([0, *ends])):

        @pl.when((block >= begin) & (block < end))
        def _(part=part, begin=begin):
            own = pl.ds((block - begin) * size, size)
            move(part, (tokens, pl.ds(block * size, size)), (tokens, own))


def _angles(time, rows, *tables):
    tokens = pl.ds(pl.program_id(0) * rows % time, rows)
    return (table[tokens][:, None] for table in tables)


def _read(ref, place, half):
    return ref[*place, half].astype(jnp.float32)


def _write(ref, place, *halves):
    for half, value in enumerate(halves):
        ref[*place, half] = value.astype(ref.dtype)


def _like(x, shape):
    return jax.ShapeDtypeStruct(shape, x.dtype)


def _launch(kernel, name, block, outs, interpret, counts, arrays, cos, sin):
    """Calls a kernel on blocks of tokens and heads, with rows of tokens and halves of heads."""

    def halved(shape):
        return math.prod(shape[:2]), shape[2], 2, shape[3] // 2

    (batch, time, _, width) = arrays[0].shape
    shared = math.gcd(*counts)
    size = min(shared & -shared, HEADS)
    rows = math.gcd(time, max(block // (size * width), 1))
    return pl.pallas_call(
        partial(kernel, time, counts, rows, size),
        out_shape=[_like(out, halved(out.shape)) for out in outs],
        grid=(batch * time // rows, sum(counts) // size),
        interpret=interpret,
        name=name,
        compiler_params=triton.CompilerParams(num_warps=4),
    )(*(x.reshape(halved(x.shape)) for x in arrays), cos, sin)
