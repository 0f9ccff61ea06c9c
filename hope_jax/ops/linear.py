"""A linear layer whose weights learn by an objective of their own: delta gradient descent."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Objective = Callable[[Float[Array, "*rows out"], Float[Array, "*rows out"]], Float[Array, ""]]


def _dot(prediction: Array, target: Array) -> Array:
    return -jnp.sum(prediction * target)


def _l2(prediction: Array, target: Array) -> Array:
    return jnp.sum(jnp.square(prediction - target)) / 2


def _huber(prediction: Array, target: Array) -> Array:
    size = jnp.abs(prediction - target)
    return jnp.sum(jnp.where(size < 1, jnp.square(size) / 2, size - 1 / 2))


OBJECTIVES: dict[str, Objective] = {"dot": _dot, "l2": _l2, "huber": _huber}
"""What a memory can minimise in (prediction, target); each is a sum over rows and features."""


def objective_named(objective: str | Objective) -> Objective:
    """Looks an objective up; a function stands for itself."""
    if callable(objective):
        return objective
    if objective not in OBJECTIVES:
        choices = ", ".join(OBJECTIVES)
        raise ValueError(f"objective must be one of {choices}, or a function, got {objective!r}")
    return OBJECTIVES[objective]


def apart(x: Array, axis: int) -> list[Array]:
    """The entries of an axis, which it takes away.

    Their gradients are laid side by side; those of slices would be padded with zeros and added, for
    which XLA moves twice as much.
    """
    return [jnp.squeeze(part, axis) for part in jnp.split(x, x.shape[axis], axis)]


def dense(
    x: Float[Array, "... D"], weight: Float[Array, "... D E"], objective: str
) -> Float[Array, "... E"]:
    """`x @ weight`, where the weight learns by an objective, see `linear`.

    Args:
      x: The input.
      weight: In the dtype that parameters have; of several (P, D, E), each is read.
      objective: "dot" is an ordinary product.

    Returns:
      The output; of several weights (..., P, E).
    """
    weight = weight.astype(x.dtype)
    if weight.ndim == 2:
        return x @ weight if objective == "dot" else linear(x, weight, objective=objective)
    if objective == "dot":
        return jnp.einsum("...D,PDE->...PE", x, weight)
    count, width, out = weight.shape
    joined = jnp.moveaxis(weight, 0, 1).reshape(width, count * out)
    return linear(x, joined, objective=objective).reshape(*x.shape[:-1], count, out)


@jax.custom_vjp
def dense_beside(
    x: Float[Array, "... D"], first: Float[Array, "D E"], second: Float[Array, "P D F"]
) -> tuple[Float[Array, "... E"], Float[Array, "... P F"]]:
    """Returns `dense(x, first, "dot")` and `dense(x, second, "dot")`.

    What both are owed comes back to x in one product, not in two that are added, each as large as
    x, and what it is laid side by side for serves the weights too.
    """
    # The barrier keeps XLA from joining these two, of whose result it would copy the parts.
    return dense(x, first, "dot"), dense(jax.lax.optimization_barrier(x), second, "dot")


def _dense_beside_backward(kept, slopes):
    x, first, second = kept
    (count, _, out), rows = second.shape, x.shape[:-1]
    second = jnp.moveaxis(second, 0, 1).reshape(x.shape[-1], count * out)
    # Written where they are to lie: XLA would first write what it lays side by side apart.
    slope = jax.lax.empty((*rows, first.shape[1] + count * out), x.dtype)
    for at, part in ((0, slopes[0]), (first.shape[1], slopes[1].reshape(*rows, -1))):
        slope = jax.lax.dynamic_update_slice_in_dim(slope, part, at, -1)
    d_x = slope @ jnp.concatenate([first, second], -1).astype(x.dtype).T
    d_weight = jnp.einsum("...D,...E->DE", x, slope, preferred_element_type=first.dtype)
    d_first, d_second = jnp.split(d_weight, [first.shape[1]], -1)
    return d_x, d_first, jnp.moveaxis(d_second.reshape(-1, count, out), 1, 0)


dense_beside.defvjp(lambda *call: (dense_beside(*call), call), _dense_beside_backward)


def linear(
    x: Float[Array, "*rows in"],
    weight: Float[Array, "in out"],
    *,
    objective: str | Objective = "l2",
    share: float | None = None,
) -> Float[Array, "*rows out"]:
    """`x @ weight`, where the gradient of the weight is that of an associative memory.

    Backpropagation stores, under every input x, what the loss wants the output to do: the target
    `u = -dloss/dy`. Generalised gradient descent makes the objective of that memory a choice:

        dweight = mean over rows of  x (d objective(y, u) / dy)^T,     y = x weight

    "dot" is `-<y, u>` and gives the gradient of the loss: plain descent. "l2" is `1/2 |y - u|^2`
    and gives delta gradient descent, W <- W (I - eta x x^T) - eta dloss/dW in the paper's W x:
    besides learning the new, the weight forgets what it said to this input before. "huber" does so
    with errors above 1 cut off. Only "dot" comes to rest where the loss does; the others rest where
    the layer already says what it is asked for, y = u, as with a weight decay of y.

    The gradient of `x` is always that of the loss. Nothing is kept for the backward pass besides
    `x` and `weight`, as in any linear layer.

    Args:
      x: The layer's input. Delta gradient descent with rate eta contracts if eta |x|^2 <= 2; see
        `hope_jax.optimizers.dgd` for the step that fits inputs of known length.
      weight: Its gradient, and nothing else, depends on the objective.
      objective: One of `OBJECTIVES`, or a function of (prediction, target).
      share: How much one row counts in the loss; None for a mean over the rows of `x`. A step that
        accumulates k parts of a batch passes 1 / (k rows).

    References:
      Behrouz et al., "Nested Learning", 2025, equations 54-60 and 112-121.
    """
    rows = x.size // x.shape[-1] if x.size else 1
    return _linear(objective_named(objective), 1 / rows if share is None else share, x, weight)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _linear(objective: Objective, share: float, x: Array, weight: Array) -> Array:
    del objective, share
    return x @ weight


def _forward(objective: Objective, share: float, x: Array, weight: Array):
    return _linear(objective, share, x, weight), (x, weight)


def _backward(objective: Objective, share: float, kept: tuple[Array, Array], dy: Array):
    x, weight = kept
    error = dy
    if objective is not _dot:  # which needs no second reading
        error = (share * jax.grad(objective)(x @ weight, -dy / share)).astype(dy.dtype)
    dweight = jnp.einsum("...i,...o->io", x, error).astype(weight.dtype)
    return (dy @ weight.T).astype(x.dtype), dweight


_linear.defvjp(_forward, _backward)
