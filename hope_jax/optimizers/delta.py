"""Momenta that look at what they already know of a gradient before they add it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from hope_jax.ops.linear import Objective, objective_named
from hope_jax.optimizers.momentum import MatrixMap, precondition
from hope_jax.optimizers.parameters import ParamInfo, each, from_matrices, to_matrices
from hope_jax.optimizers.standard import (
    StateDtype,
    check_positive,
    check_shares,
    descend,
    divide,
    settings,
    widened,
    zeros,
)


@dataclass(frozen=True, kw_only=True)
class DeltaMomentumConfig:
    """Momentum with the delta rule, see `delta_momentum`.

    Attributes:
      decay: Share of the momentum that survives a step (alpha).
      erase: How much of what the momentum says along the new gradient is erased (c), of [0, 1].
      preconditioner: "none", or "diagonal" as Adam's.
      b2: Share of the diagonal that survives a step.
      eps: Added to the root of the diagonal.
      state_dtype: Of the momentum; None for the parameters' own.
    """

    kind: Literal["delta_momentum"] = "delta_momentum"
    decay: float = 0.9
    erase: float = 0.9
    preconditioner: Literal["none", "diagonal"] = "none"
    b2: float = 0.95
    eps: float = 1e-8
    state_dtype: StateDtype | None = None

    def __post_init__(self):
        self.build(0.0)

    def build(
        self,
        learning_rate: optax.ScalarOrSchedule,
        *,
        weight_decay: float = 0.0,
        info: PyTree[ParamInfo] | None = None,
    ) -> optax.GradientTransformation:
        """Makes the optimizer, see `descend` for the arguments."""
        return delta_momentum(learning_rate, **settings(self), weight_decay=weight_decay, info=info)


@dataclass(frozen=True, kw_only=True)
class GMConfig:
    """Generalised momentum, see `gm`.

    Attributes:
      decay: Share of the momentum that survives a step (alpha).
      write: Size of the step on the objective, of (0, 1].
      objective: Of the memory.
      state_dtype: Of the momentum; None for the parameters' own.
    """

    kind: Literal["gm"] = "gm"
    decay: float = 0.9
    write: float = 0.9
    objective: Literal["dot", "l2", "huber"] = "huber"
    state_dtype: StateDtype | None = None

    def __post_init__(self):
        self.build(0.0)

    def build(
        self,
        learning_rate: optax.ScalarOrSchedule,
        *,
        weight_decay: float = 0.0,
        info: PyTree[ParamInfo] | None = None,
    ) -> optax.GradientTransformation:
        """Makes the optimizer, see `descend` for the arguments."""
        return gm(learning_rate, **settings(self), weight_decay=weight_decay, info=info)


class MomentumState(NamedTuple):
    """State of a momentum.

    Attributes:
      momentum: m, shaped as the parameters; points uphill.
      preconditioner: State of P.
    """

    momentum: optax.Updates
    preconditioner: optax.OptState


def scale_by_delta_momentum(
    decay: float = DeltaMomentumConfig.decay,
    *,
    erase: float = DeltaMomentumConfig.erase,
    preconditioner: str | MatrixMap = DeltaMomentumConfig.preconditioner,
    b2: float = DeltaMomentumConfig.b2,
    eps: float = DeltaMomentumConfig.eps,
    state_dtype: StateDtype | None = None,
    info: PyTree[ParamInfo] | None = None,
) -> optax.GradientTransformation:
    """Momentum that erases what it said along a gradient before it adds that gradient.

        m <- m (alpha I - c g^T g / |g|^2) + P g

    for m and g of shape (out, in): one step of a memory with the objective `1/2 |m g^T - P|^2` (the
    paper's m points downhill and has `- eta P g`). Without the division by |g|^2 it diverges for
    large gradients; with it the matrix in brackets shrinks for alpha and c of [0, 1]. What is no
    matrix is a single row. With c = 0 it is `optax.trace`.

    References:
      Behrouz et al., "Nested Learning", 2025, equations 48-49.
    """
    check_shares({"decay": decay, "b2": b2})
    check_positive({"eps": eps})
    if not 0 <= erase <= 1:
        raise ValueError(f"erase must lie in [0, 1], got {erase}")

    def step(key: Array, value: Array, memory: Array) -> Array:
        return decay * memory - erase * _recall(memory, key) + value

    return _momentum(
        step, precondition(preconditioner, b2=b2, eps=eps, info=info), state_dtype, info
    )


def scale_by_gm(
    decay: float = GMConfig.decay,
    *,
    write: float = GMConfig.write,
    objective: str | Objective = GMConfig.objective,
    state_dtype: StateDtype | None = None,
    info: PyTree[ParamInfo] | None = None,
) -> optax.GradientTransformation:
    """Generalised momentum: a memory of gradients with any objective.

        m <- alpha m - w |g|^2 d/dm objective(m g^T / |g|^2, I)

    where the powers of |g| make the memory twice as large for gradients twice as large, as momentum
    is. "dot" is momentum (`optax.trace`), "l2" delta momentum, with w in front of either term;
    in "huber" one step moves no more than one gradient's worth, however small that is beside what
    the momentum holds. The gradient comes from `jax.grad`. The prediction is (out, out): delta
    momentum is the cheaper way to "l2".

    References:
      Behrouz et al., "Nested Learning", 2025, section 4.5 and equations 59-60.
    """
    check_shares({"decay": decay})
    if not 0 < write <= 1:
        raise ValueError(f"write must lie in (0, 1], got {write}")
    loss = objective_named(objective)

    def step(key: Array, value: Array, memory: Array) -> Array:
        del value
        square = _square(key)
        target = jnp.broadcast_to(jnp.eye(key.shape[-2]), (*key.shape[:-1], key.shape[-2]))

        def surprise(memory: Array) -> Array:
            return loss(divide(memory @ key.mT, square), target)

        return decay * memory - write * square * jax.grad(surprise)(memory)

    return _momentum(step, optax.identity(), state_dtype, info)


def delta_momentum(
    learning_rate: optax.ScalarOrSchedule,
    *,
    decay: float = DeltaMomentumConfig.decay,
    erase: float = DeltaMomentumConfig.erase,
    preconditioner: str | MatrixMap = DeltaMomentumConfig.preconditioner,
    b2: float = DeltaMomentumConfig.b2,
    eps: float = DeltaMomentumConfig.eps,
    state_dtype: StateDtype | None = None,
    weight_decay: float = 0.0,
    info: PyTree[ParamInfo] | None = None,
) -> optax.GradientTransformation:
    """See `scale_by_delta_momentum` and `descend`."""
    momentum = scale_by_delta_momentum(
        decay,
        erase=erase,
        preconditioner=preconditioner,
        b2=b2,
        eps=eps,
        state_dtype=state_dtype,
        info=info,
    )
    return optax.chain(momentum, descend(learning_rate, weight_decay=weight_decay, info=info))


def gm(
    learning_rate: optax.ScalarOrSchedule,
    *,
    decay: float = GMConfig.decay,
    write: float = GMConfig.write,
    objective: str | Objective = GMConfig.objective,
    state_dtype: StateDtype | None = None,
    weight_decay: float = 0.0,
    info: PyTree[ParamInfo] | None = None,
) -> optax.GradientTransformation:
    """See `scale_by_gm` and `descend`."""
    momentum = scale_by_gm(
        decay, write=write, objective=objective, state_dtype=state_dtype, info=info
    )
    return optax.chain(momentum, descend(learning_rate, weight_decay=weight_decay, info=info))


def _momentum(
    step: Callable[[Array, Array, Array], Array],
    preconditioner: optax.GradientTransformation,
    state_dtype: StateDtype | None,
    info: PyTree[ParamInfo] | None,
) -> optax.GradientTransformation:
    """A memory of matrices, moved by `step(key, value, memory)` in float32 and read as it is."""

    def init(params: optax.Params) -> MomentumState:
        return MomentumState(
            zeros(params, state_dtype),
            preconditioner.init(params),
        )

    def update(updates, state, params=None):
        values, inner = preconditioner.update(updates, state.preconditioner, params)

        def one(info: ParamInfo, *arrays: Array) -> tuple[Array, Array]:
            g, _, old = arrays
            wide = widened(g)
            new = step(*(to_matrices(info, x).astype(wide) for x in arrays))
            new = from_matrices(info, new, g)
            return new.astype(g.dtype), new.astype(old.dtype)

        updates, momentum = each(2, one, updates, values, state.momentum, info=info)
        return updates, MomentumState(momentum, inner)

    return optax.GradientTransformation(init, update)


def _recall(
    memory: Float[Array, "... out in"], key: Float[Array, "... out in"]
) -> Float[Array, "... out in"]:
    """`m g^T g / |g|^2`, by way of the smaller of the two products."""
    scale = jnp.sqrt(_square(key))
    unit = divide(key, scale)
    if key.shape[-2] <= key.shape[-1]:
        return (memory @ unit.mT) @ unit
    return memory @ (unit.mT @ unit)


def _square(x: Float[Array, "... out in"]) -> Float[Array, "... 1 1"]:
    return jnp.sum(x * x, axis=(-2, -1), keepdims=True)
