"""Inverts and solves unit lower triangular systems, the one sequential step inside a chunk."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

BLOCK = 16
"""Below this size rows are substituted one by one; above it, inverses of halves are merged."""


@jax.custom_vjp
def unit_lower_inverse(lower: Float[Array, "*batch C C"]) -> Float[Array, "*batch C C"]:
    """Inverts `I + lower`.

    Substitution in diagonal blocks of 16, then merges of neighbours,

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
        return _substitute(lower)
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


def _substitute(lower):
    """Inverts small blocks row by row: row t is e_t minus `lower`'s mixture of earlier rows."""

    def step(t, inverse):
        mixture = jax.lax.dynamic_index_in_dim(lower, t, -2)
        mixture = jnp.einsum("...TS,...SC->...TC", mixture, inverse, precision="highest")
        row = jax.lax.dynamic_index_in_dim(inverse, t, -2) - mixture
        return jax.lax.dynamic_update_index_in_dim(inverse, row, t, inverse.ndim - 2)

    size = lower.shape[-1]
    unit = jnp.broadcast_to(jnp.eye(size, dtype=lower.dtype), lower.shape)
    return jax.lax.fori_loop(1, size, step, unit)


def _merge(lower):
    """Inverts all diagonal blocks at once, then doubles the block until it is the whole."""
    inverse = _substitute(_diagonal_blocks(lower, BLOCK))
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
