"""Inverts and solves unit lower triangular systems, the one sequential step inside a chunk."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

BLOCK = 16
"""Up to this size merges are masked products of whole blocks; above it, of the halves alone."""


@jax.custom_vjp
def unit_lower_inverse(lower: Float[Array, "*batch C C"]) -> Float[Array, "*batch C C"]:
    """Inverts `I + lower`.

    Block substitution: neighbours of 1, 2, 4, ... rows are merged,

        [[A, 0], [B, D]]^-1 = [[A^-1, 0], [-D^-1 B A^-1, D^-1]].

    Stable for strongly correlated keys, where summing the Neumann series by doubling is not.

    Args:
      lower: Strictly lower triangular. Entries elsewhere must be zero.

    Returns:
      The inverse, unit lower triangular. Any size works, also odd ones.

    References:
      Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence
      Length", 2024 (the UT transform).
    """
    size = lower.shape[-1]
    if size <= BLOCK:
        return _invert_block(lower)
    width = BLOCK
    while width < size:
        width *= 2
    padding = [(0, 0)] * (lower.ndim - 2) + [(0, width - size)] * 2
    return _merge(jnp.pad(lower, padding))[..., :size, :size]


def _inverse_forward(lower):
    inverse = unit_lower_inverse(lower)
    return inverse, inverse


def _inverse_backward(inverse, cotangent):
    product = jnp.einsum("...CI,...CD->...ID", inverse, cotangent, precision="highest")
    product = jnp.einsum("...ID,...JD->...IJ", product, inverse, precision="highest")
    return (-jnp.tril(product, -1),)


unit_lower_inverse.defvjp(_inverse_forward, _inverse_backward)


@jax.custom_vjp
def unit_lower_solve(
    lower: Float[Array, "*batch C C"],  # noqa: ARG001  (its gradient is the point)
    inverse: Float[Array, "*batch C C"],
    right: Float[Array, "*batch C V"],
) -> Float[Array, "*batch C V"]:
    """Solves `(I + lower) x = right` with an inverse that is at hand.

    One inverse serves every right-hand side. The gradient needs no second one: with
    `Z = inverse^T dx`, `d right = Z` and `d lower = -tril(Z x^T, -1)`.

    Args:
      lower: Strictly lower triangular.
      inverse: `unit_lower_inverse(lower)`. No gradient flows into it; it goes to `lower`.
      right: The right-hand sides, one per column.

    Returns:
      The solutions.
    """
    return jnp.einsum("...CD,...DV->...CV", inverse, right, precision="highest")


def _solve_forward(lower, inverse, right):
    solution = unit_lower_solve(lower, inverse, right)
    return solution, (inverse, solution)


def _solve_backward(residuals, cotangent):
    inverse, solution = residuals
    right = jnp.einsum("...CD,...CV->...DV", inverse, cotangent, precision="highest")
    lower = jnp.einsum("...CV,...DV->...CD", right, solution, precision="highest")
    return -jnp.tril(lower, -1), jnp.zeros_like(inverse), right


unit_lower_solve.defvjp(_solve_forward, _solve_backward)


def _invert_block(lower):
    """Inverts small blocks by the same merges, of 1, 2, 4, ... rows, on the whole block at once.

    The highest bit in which row and column differ tells to which merge an entry belongs, and with
    `T` the inverses so far the corners that a merge fills are those of `-T L T`.
    """
    row = jnp.arange(lower.shape[-1])
    differ = row[:, None] ^ row
    inverse = jnp.where(differ == 0, 1, jnp.where(differ == 1, -lower, 0))
    size = 2
    while size < lower.shape[-1]:
        corners = jnp.where((differ >= size) & (differ < 2 * size), lower, 0)
        corners = jnp.einsum("...IJ,...JK->...IK", inverse, corners, precision="highest")
        inverse -= jnp.einsum("...IJ,...JK->...IK", corners, inverse, precision="highest")
        size *= 2
    return inverse


def _merge(lower):
    """Inverts all diagonal blocks at once, then doubles the block until it is the whole."""
    inverse = _invert_block(_diagonal_blocks(lower, BLOCK))
    while inverse.shape[-3] > 1:
        size = inverse.shape[-1]
        below = _diagonal_blocks(lower, 2 * size)[..., size:, :size]
        first, second = inverse[..., 0::2, :, :], inverse[..., 1::2, :, :]
        corner = jnp.einsum("...IJ,...JK->...IK", second, below, precision="highest")
        corner = -jnp.einsum("...IJ,...JK->...IK", corner, first, precision="highest")
        upper = jnp.concatenate([first, jnp.zeros_like(first)], -1)
        inverse = jnp.concatenate([upper, jnp.concatenate([corner, second], -1)], -2)
    return inverse[..., 0, :, :]


def _diagonal_blocks(matrix, size):
    blocks = [
        matrix[..., start : start + size, start : start + size]
        for start in range(0, matrix.shape[-1], size)
    ]
    return jnp.stack(blocks, -3)
