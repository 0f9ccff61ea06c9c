"""Orthogonalises matrices with matrix products alone: singular values go to about 1."""

from collections.abc import Sequence
from math import prod

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float

# Printed by benchmarks/newton_schulz_coefficients.py, which derives them: each row is the odd
# quintic nearest to 1 on the interval that the rows before it leave of [6.5e-4, 1.01], with 1%
# added in every step for rounding. Together they send [6.5e-4, 1] into [0.711, 1.182].
POLYNOMIALS = (
    (8.401933, -24.429539, 17.771823),
    (4.168440, -3.036002, 0.554616),
    (4.028908, -2.941717, 0.544368),
    (3.557282, -2.615854, 0.509088),
    (2.453694, -1.794426, 0.409673),
)


def newton_schulz(
    x: Float[Array, "*stack rows columns"],
    *,
    precision: jax.lax.PrecisionLike = jax.lax.Precision.HIGH,
) -> Float[Array, "*stack rows columns"]:
    """Replaces the singular values of each matrix by numbers between 0.7 and 1.2.

    Five times, with `a, b, c` from `POLYNOMIALS` (in a loop, so that few products are compiled):

        X <- a X + (b A + c A^2) X,    A = X X^T

    which maps every singular value s to `a s + b s^3 + c s^5` and leaves singular vectors alone.
    Singular values from 1 down to 1/1000 of the largest end in [0.7, 1.2], smaller ones below;
    zero stays zero. Before the first step the matrix is divided by a bound on its largest singular
    value. The Frobenius norm is up to sqrt(rows) too large, which costs that much of the range; the
    norms of A^4, of which A^2 is needed anyway, are at most 1.5 too large for 4096 rows.

    Args:
      x: Matrices; tall ones are worked on from the short side. Any scale.
      precision: Of the products. Three passes of bfloat16 on a TPU and tf32 on a GPU are what the
        polynomials leave room for; one pass of bfloat16 loses small singular values.

    Returns:
      The dtype of `x`; inside it is float32.

    References:
      Jordan, "Muon", 2024. Amsel et al., "The Polar Express", 2025.
    """
    if x.size == 0:
        return x
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    tall = x.shape[-2] > x.shape[-1]
    wide = wide.mT if tall else wide

    def times(a: Array, b: Array) -> Array:
        return jnp.matmul(a, b, precision=precision)

    wide = _divide(wide, jnp.max(jnp.abs(wide), axis=(-2, -1), keepdims=True))
    wide = _divide(wide, jnp.linalg.norm(wide, axis=(-2, -1), keepdims=True))
    gram = times(wide, wide.mT)
    square = times(gram, gram)
    bound = _largest_eigenvalue(times(square, square)) ** (1 / 8)
    wide, gram, square = _divide(wide, bound), _divide(gram, bound**2), _divide(square, bound**4)

    def polynomial(wide, gram, square, factors):
        a, b, c = factors
        return a * wide + times(b * gram + c * square, wide)

    def step(wide, factors):
        gram = times(wide, wide.mT)
        return polynomial(wide, gram, times(gram, gram), factors), None

    first, *others = POLYNOMIALS
    factors = tuple(jnp.array(column, wide.dtype) for column in zip(*others, strict=True))
    wide, _ = jax.lax.scan(step, polynomial(wide, gram, square, first), factors)
    return (wide.mT if tall else wide).astype(x.dtype)


def newton_schulz_all(
    stacks: Sequence[Float[Array, "... _rows _columns"]],
) -> list[Float[Array, "... _rows _columns"]]:
    """Orthogonalises many stacks of matrices, those of equal shape in one batch.

    Where a mesh is in use, the matrices of a batch are dealt out to all of its devices, whole ones,
    padded with zeros to a multiple of the devices. A matrix that is split over devices would
    exchange its parts in each of the fifteen products, and copies of the model would all do the
    same work; this way the parts travel once to where they are orthogonalised and once back.

    Args:
      stacks: As for `newton_schulz`.

    Returns:
      The orthogonalised stacks, in the same order.
    """
    groups: dict[tuple, list[int]] = {}
    for index, x in enumerate(stacks):
        groups.setdefault((x.dtype, *sorted(x.shape[-2:])), []).append(index)
    results: list[Array] = list(stacks)
    for (_, rows, columns), members in groups.items():
        flat = [_short_side_first(stacks[i]).reshape(-1, rows, columns) for i in members]
        joined = newton_schulz(_deal_out(jnp.concatenate(flat) if len(flat) > 1 else flat[0]))
        start = 0
        for i in members:
            count, tall = prod(stacks[i].shape[:-2]), stacks[i].shape[-2] > stacks[i].shape[-1]
            part = joined[start : start + count]
            results[i] = (part.mT if tall else part).reshape(stacks[i].shape)
            start += count
    return results


def _divide(x: Array, by: Array) -> Array:
    return x / jnp.where(by > 0, by, 1)


def _largest_eigenvalue(x: Float[Array, "*stack N N"]) -> Float[Array, "*stack 1 1"]:
    """Bounds the largest eigenvalue of symmetric matrices by the smaller of two norms."""
    frobenius = jnp.linalg.norm(x, axis=(-2, -1), keepdims=True)
    rows = jnp.max(jnp.sum(jnp.abs(x), axis=-1, keepdims=True), axis=-2, keepdims=True)
    return jnp.minimum(frobenius, rows)


def _short_side_first(x: Array) -> Array:
    return x.mT if x.shape[-2] > x.shape[-1] else x


def _deal_out(x: Float[Array, "N rows columns"]) -> Float[Array, "M rows columns"]:
    """Pads to a multiple of the devices and splits whole matrices among them."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or any(kind != AxisType.Auto for kind in mesh.axis_types):
        return x
    x = jnp.pad(x, ((0, -x.shape[0] % mesh.size), (0, 0), (0, 0)))
    return jax.lax.with_sharding_constraint(x, PartitionSpec(mesh.axis_names))
