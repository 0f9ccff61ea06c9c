"""The short convolution and its SiLU on a GPU, through Triton: each number is moved once.

A program has some features of a piece of a row and goes through its tokens one by one, so that the
last window - 1 of them, and what they are owed, stay in registers. Only at the ends of its piece
are tokens read, or sigmoids computed, that others have too. Tokens become float32 when it is their
turn, and masks of documents are left out of blocks that need none: registers and instructions are
what keeps a kernel from the speed of memory.

    forward     2 window + 5 FLOPs and one exponential a number; read and written once
    backward    6 window + 9 FLOPs and one exponential a number; two read, one written

At 2 bytes a number both are bound by memory: 8 x 4,096 tokens of 2 x 1,024 features take an H100
(3.35 TB/s) at least 0.08 and 0.12 ms.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float, Int

PIECE, BLOCK = 256, 8
"""Tokens of a program, and those that are asked for at once."""

WIDTH = 512
"""Features of a program."""


def refusal(time: int, features: int, window: int) -> str | None:
    """Says why the kernels do not take so many tokens, features and weights, or None if they do."""
    if time % BLOCK or features % 128 or window > BLOCK:
        return (
            f"the kernel takes multiples of {BLOCK} tokens and of 128 features, at most {BLOCK} "
            f"weights for each, got {time}, {features} and {window}"
        )
    return None


def forward(
    x: Float[Array, "B T N E"],
    kernel: Float[Array, "window P E"],
    age: Int[Array, "B T"],
    scales: tuple[float, ...],
    *,
    interpret: bool,
) -> list[Float[Array, "B T E"]]:
    """Convolves the first P parts of x and passes them through SiLU.

    Args:
      x: The tokens.
      kernel: The weights, that of the token itself first.
      age: How many tokens of its document are before each token.
      scales: What each part is multiplied by.
      interpret: Whether to interpret the kernel instead of compiling it.

    Returns:
      One array for each of the P parts.
    """
    batch, time, _, features = x.shape
    grid, options = _launch(time, features, batch, features)
    out = jax.ShapeDtypeStruct((batch, time, features), x.dtype)
    return [
        pl.pallas_call(
            partial(_forward_kernel, part, scale, Arithmetic(interpret)),
            out_shape=out, grid=grid, interpret=interpret,
            name="convolution_forward", compiler_params=options,
        )(x, kernel, age)
        for part, scale in enumerate(scales)
    ]  # fmt: skip


def _forward_kernel(part, scale, use, x, kernel, age, y):
    b, first, columns = _place(x.shape[3], x.shape[1])
    window = kernel.shape[0]
    weights = [kernel[back, part, columns].astype(jnp.float32) for back in range(window)]

    def token(t, past, number, old):
        number = number.astype(jnp.float32)
        mixed = _mix(use, weights, _seen((number, *past), old))
        y[b, t, columns] = (scale * mixed * use.sigmoid(mixed)).astype(y.dtype)
        return (number, *past)[: window - 1]

    def block(i, past):
        start = first + i * BLOCK
        numbers = [x[b, start + r, part, columns] for r in range(BLOCK)]

        def read(past, ages):
            for r in range(BLOCK):
                past = token(start + r, past, numbers[r], ages[r])
            return past

        return _with_ages(age, b, start, window, read, past)

    past = _history(x, b, first, part, columns, window)
    jax.lax.fori_loop(0, _piece(x.shape[1]) // BLOCK, block, past)


def backward(
    x: Float[Array, "B T N E"],
    kernel: Float[Array, "window P E"],
    age: Int[Array, "B T"],
    scales: tuple[float, ...],
    slopes: list[Float[Array, "B T E"]],
    *,
    interpret: bool,
) -> tuple[Float[Array, "B T N E"], Float[Array, "window P E"]]:
    """Returns the gradients of x, of which parts behind the first P were handed on, and of kernel.

    Args:
      x: As for `forward`.
      kernel: As for `forward`.
      age: As for `forward`.
      scales: As for `forward`.
      slopes: The gradients of all N parts of the output.
      interpret: As for `forward`.
    """
    batch, time, count, features = x.shape
    window, parts, _ = kernel.shape
    of_all = (*scales, *[None] * (count - parts))
    grid, options = _launch(time, features, batch, count * features)
    pieces = time // _piece(time)
    dx, dkernel = pl.pallas_call(
        partial(_backward_kernel, of_all, Arithmetic(interpret)),
        out_shape=(
            jax.ShapeDtypeStruct(x.shape, x.dtype),
            jax.ShapeDtypeStruct((batch, pieces, window, parts, features), jnp.float32),
        ),
        grid=grid,
        interpret=interpret,
        name="convolution_backward",
        compiler_params=options,
    )(x, kernel, age, *slopes)
    return dx, jnp.sum(dkernel, (0, 1)).astype(kernel.dtype)


def _backward_kernel(scales, use, x, kernel, age, *refs):
    *slopes, dx, dkernel = refs
    place, groups = _place(x.shape[3], x.shape[1]), x.shape[3] // _width(x.shape[3])
    mine = pl.program_id(0) // groups
    for part, (scale, slope) in enumerate(zip(scales, slopes, strict=True)):
        work = _hand_back if scale is None else partial(_push_back, scale, use)

        @pl.when(mine == part)
        def _(part=part, slope=slope, work=work):
            work(place, part, x, kernel, age, slope, dx, dkernel)


def _hand_back(place, part, x, kernel, age, slope, dx, dkernel):
    del kernel, age, dkernel
    b, first, columns = place

    def block(i, _):
        tokens = [first + i * BLOCK + r for r in range(BLOCK)]
        numbers = [slope[b, t, columns] for t in tokens]
        for t, number in zip(tokens, numbers, strict=True):
            dx[b, t, part, columns] = number

    jax.lax.fori_loop(0, _piece(x.shape[1]) // BLOCK, block, None)


def _push_back(scale, use, place, part, x, kernel, age, slope, dx, dkernel):
    b, first, columns = place
    time, window = x.shape[1], kernel.shape[0]
    weights = [kernel[back, part, columns].astype(jnp.float32) for back in range(window)]

    def token(carry, t, number, owed, old):
        """What is owed for tokens up to t; that for the one window - 1 before is then complete."""
        past, due = carry
        number, owed = number.astype(jnp.float32), owed.astype(jnp.float32)
        seen = _seen((number, *past), old)
        mixed = _mix(use, weights, seen)
        gate = use.sigmoid(mixed)
        owed = scale * owed * use.add(mixed * gate, 1 - gate, gate)
        first_share, *shares = _seen(weights, old)
        shares = (use.add(share, owed, before) for share, before in zip(shares, due, strict=True))
        due = [first_share * owed, *shares]
        # The first few are not of this piece: they are written over with those that are.
        dx[b, jnp.maximum(t - window + 1, first), part, columns] = due[-1].astype(dx.dtype)
        return ((number, *past)[: window - 1], tuple(due[:-1])), owed, seen

    def block(i, carry):
        start = first + i * BLOCK
        numbers = [x[b, start + r, part, columns] for r in range(BLOCK)]
        owed = [slope[b, start + r, columns] for r in range(BLOCK)]

        def push(carry, ages):
            walk, totals = carry
            for r in range(BLOCK):
                walk, pushed, seen = token(walk, start + r, numbers[r], owed[r], ages[r])
                pairs = zip(seen, totals, strict=True)
                totals = tuple(use.add(pushed, number, total) for number, total in pairs)
            return walk, totals

        return _with_ages(age, b, start, window, push, carry)

    past = _history(x, b, first, part, columns, window)
    zeros = tuple(jnp.zeros(columns.size, jnp.float32) for _ in range(window))
    walk, totals = jax.lax.fori_loop(0, _piece(time) // BLOCK, block, ((past, zeros[1:]), zeros))
    for back, total in enumerate(totals):
        dkernel[b, first // _piece(time), back, part, columns] = total
    for after in range(window - 1):  # tokens of the next piece, for what they owe to this one
        t = first + _piece(time) + after
        here = jnp.minimum(t, time - 1)
        owed = jnp.where(t < time, slope[b, here, columns], 0)
        walk, *_ = token(walk, t, x[b, here, part, columns], owed, age[b, here])


def _with_ages(age, b, start, window, work, carry):
    """Works on a block given the tokens' ages, None for all where none is too young to matter."""
    eldest = age[b, start]
    one_document = age[b, start + BLOCK - 1] == eldest + BLOCK - 1
    return jax.lax.cond(
        one_document & (eldest >= window - 1),
        lambda carry: work(carry, [None] * BLOCK),
        lambda carry: work(carry, [age[b, start + r] for r in range(BLOCK)]),
        carry,
    )


def _seen(values, old):
    """Values for a token and those before it, zero for those that are not of its document."""
    if old is None:
        return list(values)
    return [
        jnp.where(old >= back, value, 0) if back else value for back, value in enumerate(values)
    ]


def _mix(use, weights, seen):
    mixed = weights[0] * seen[0]
    for weight, number in zip(weights[1:], seen[1:], strict=True):
        mixed = use.add(weight, number, mixed)
    return mixed


class Arithmetic(NamedTuple):
    """Instructions that the compiler of kernels does not find; interpreted, what they compute."""

    interpret: bool

    def add(self, a, b, c):
        """A product and a sum in one."""
        return a * b + c if self.interpret else _instruct("fma.rn.f32 $0, $1, $2, $3;", a, b, c)

    def sigmoid(self, x):
        """The sigmoid, but for the last digits."""
        if self.interpret:
            return jax.nn.sigmoid(x)
        power = _instruct("ex2.approx.ftz.f32 $0, $1;", x * -math.log2(math.e))
        return _instruct("rcp.approx.ftz.f32 $0, $1;", 1 + power)


def _instruct(instruction, *args):
    (found,) = triton.elementwise_inline_asm(
        instruction,
        args=args,
        constraints=",".join(["=f"] + ["f"] * len(args)),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, args[0].dtype)],
    )
    return found


def _history(x, b, first, part, columns, window):
    """The tokens before a piece, the last one first; before the first piece, any numbers."""
    return tuple(
        x[b, jnp.maximum(first - back, 0), part, columns].astype(jnp.float32)
        for back in range(1, window)
    )


def _place(features, time):
    """The row, the first token and the features of a program."""
    width = _width(features)
    columns = pl.ds(pl.program_id(0) % (features // width) * width, width)
    return pl.program_id(2), pl.program_id(1) * _piece(time), columns


def _launch(time, features, batch, columns):
    width = _width(features)
    grid = columns // width, time // _piece(time), batch
    return grid, triton.CompilerParams(num_warps=width // 128, num_stages=1)


def _piece(time):
    return math.gcd(time, PIECE)


def _width(features):
    return math.gcd(features, WIDTH)
