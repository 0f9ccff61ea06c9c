"""M3: Muon with a fast and a slow momentum, and the variance of Adam."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from hope_jax.ops.orthogonal import newton_schulz_all
from hope_jax.optimizers.parameters import ParamInfo
from hope_jax.optimizers.standard import (
    StateDtype,
    check_positive,
    check_shares,
    check_weight,
    descend,
    divide,
    scale_by_shape,
    settings,
    wide_zeros,
    with_adam_for_the_rest,
    zeros,
)


@dataclass(frozen=True, kw_only=True)
class M3Config:
    """Multi-scale momentum Muon, see `m3`.

    Attributes:
      b1: Share of the fast momentum that survives a step.
      b2: Share of the second moment that survives a step.
      b3: Share of the slow momentum that survives a period.
      slow: Weight of the slow momentum (alpha).
      period: Steps of a period (f).
      damping: Added to the root of the second moment, in units of its root mean square over the
        matrix; large numbers switch the second moment off.
      rms: Root mean square of a matrix's update before the learning rate, see `MuonConfig`.
      state_dtype: Of the momenta; None for the parameters' own.
    """

    kind: Literal["m3"] = "m3"
    b1: float = 0.95
    b2: float = 0.95
    b3: float = 0.9
    slow: float = 0.5
    period: int = 8
    damping: float = 1.0
    rms: float = 0.2
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
        return m3(learning_rate, **settings(self), weight_decay=weight_decay, info=info)


@dataclass(frozen=True, kw_only=True)
class M3PrintedConfig:
    """M3 as the paper prints it, see `m3_printed`.

    Attributes:
      b1: Weight of a gradient in the fast momentum.
      b2: Weight of a squared gradient in the second moment.
      b3: Weight of a gradient in the slow momentum.
      slow: Weight of the slow momentum (alpha).
      period: Steps of a period (f).
      eps: Added to the root of the second moment.
      state_dtype: Of the momenta; None for the parameters' own.
    """

    kind: Literal["m3_printed"] = "m3_printed"
    b1: float = 0.9
    b2: float = 0.9
    b3: float = 0.9
    slow: float = 0.5
    period: int = 8
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
        return m3_printed(learning_rate, **settings(self), weight_decay=weight_decay, info=info)


class M3State(NamedTuple):
    """State of `scale_by_m3` and `scale_by_m3_printed`.

    Attributes:
      count: Steps so far.
      fast: M1.
      second: V.
      slow: M2, to which the gradients of the current period are added as they come.
      direction: M2 at the end of the last period, orthogonalised (O2).
    """

    count: Int[Array, ""]
    fast: optax.Updates
    second: optax.Updates
    slow: optax.Updates
    direction: optax.Updates


def scale_by_m3(
    *,
    b1: float = M3Config.b1,
    b2: float = M3Config.b2,
    b3: float = M3Config.b3,
    slow: float = M3Config.slow,
    period: int = M3Config.period,
    damping: float = M3Config.damping,
    state_dtype: StateDtype | None = None,
) -> optax.GradientTransformation:
    """M3 with momenta that fade.

        M1 <- b1 M1 + (1 - b1) g                       O1 = NS(M1)
        V  <- b2 V + (1 - b2) g^2                      D = 1 / (sqrt(V) + damping rms(sqrt(V)))
        M2 <- b3 M2 + (1 - b3) mean of the period's g  O2 = NS(M2), at the end of every period
        update = (O1 + alpha O2) * D, scaled to the norm of O1 + alpha O2

    Three things differ from `scale_by_m3_printed`. Momenta and V fade, so that old gradients and
    early squares do not rule for ever. An orthogonalised momentum has no units, so that V, which
    has, only weighs the elements of a matrix against each other: scaling the gradient changes
    nothing, as in Muon. And the damping is relative: O has large elements where gradients are
    small, unlike Adam's momentum, and an absolute 1e-8 would let these rule the update. With
    alpha = 0 and a large damping it is Muon.

    All leaves must be matrices (their last two axes; those in front stack). Newton-Schulz of M2 is
    computed once in a period, that of M1 in every step, for equal shapes in one batch that the
    devices share (see `newton_schulz_all`). State: four numbers for each parameter.

    Args:
      b1: Share of M1 that survives a step.
      b2: Share of V that survives a step.
      b3: Share of M2 that survives a period.
      slow: alpha.
      period: f.
      damping: See above.
      state_dtype: Of M1, M2 and O2; V is float32.

    References:
      Behrouz et al., "Nested Learning", 2025, algorithm 1. Jordan, "Muon", 2024.
    """
    check_shares({"b1": b1, "b2": b2, "b3": b3})
    check_positive({"period": period, "damping": damping})
    check_weight({"slow": slow})

    def add(state: M3State, grads: optax.Updates) -> tuple[optax.Updates, ...]:
        # What a period leaves of M2 is taken from it when its first gradient comes.
        fade = jnp.where(state.count % period == 0, b3, 1.0)
        return (
            jax.tree.map(lambda m, g: b1 * m + (1 - b1) * g, state.fast, grads),
            jax.tree.map(lambda v, g: b2 * v + (1 - b2) * jnp.square(g), state.second, grads),
            jax.tree.map(lambda m, g: fade * m + (1 - b3) / period * g, state.slow, grads),
        )

    def weigh(direction: Array, second: Array) -> Array:
        axes = (-2, -1)
        root = jnp.sqrt(second)
        mean = jnp.sqrt(jnp.mean(second, axis=axes, keepdims=True))
        weighed = divide(direction, root + damping * mean)
        norm = jnp.linalg.norm(direction, axis=axes, keepdims=True)
        return weighed * divide(norm, jnp.linalg.norm(weighed, axis=axes, keepdims=True))

    return _m3(add, weigh, slow, period, state_dtype)


def scale_by_m3_printed(
    *,
    b1: float = M3PrintedConfig.b1,
    b2: float = M3PrintedConfig.b2,
    b3: float = M3PrintedConfig.b3,
    slow: float = M3PrintedConfig.slow,
    period: int = M3PrintedConfig.period,
    eps: float = M3PrintedConfig.eps,
    state_dtype: StateDtype | None = None,
) -> optax.GradientTransformation:
    """M3 as algorithm 1 prints it.

        M1 <- M1 + b1 g      V <- V + b2 g^2      M2 <- M2 + b3 sum of the last f g, every f steps
        update = (NS(M1) + alpha NS(M2)) / (sqrt(V) + eps)

    Nothing fades, the step shrinks as V grows, and its size is inverse to that of the gradient:
    elements whose first gradients are near zero take huge steps. For comparison; `scale_by_m3` is
    the one to use. Leaves, state and cost are as there.

    References:
      Behrouz et al., "Nested Learning", 2025, algorithm 1.
    """
    check_shares({"b1": b1, "b2": b2, "b3": b3})
    check_positive({"period": period, "eps": eps})
    check_weight({"slow": slow})

    def add(state: M3State, grads: optax.Updates) -> tuple[optax.Updates, ...]:
        return (
            jax.tree.map(lambda m, g: m + b1 * g, state.fast, grads),
            jax.tree.map(lambda v, g: v + b2 * jnp.square(g), state.second, grads),
            jax.tree.map(lambda m, g: m + b3 * g, state.slow, grads),
        )

    def weigh(direction: Array, second: Array) -> Array:
        return direction / (jnp.sqrt(second) + eps)

    return _m3(add, weigh, slow, period, state_dtype)


def m3(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = M3Config.b1,
    b2: float = M3Config.b2,
    b3: float = M3Config.b3,
    slow: float = M3Config.slow,
    period: int = M3Config.period,
    damping: float = M3Config.damping,
    rms: float = M3Config.rms,
    state_dtype: StateDtype | None = None,
    weight_decay: float = 0.0,
    info: PyTree[ParamInfo] | None = None,
) -> optax.GradientTransformation:
    """See `scale_by_m3` and `descend`; updates scaled as Muon's, AdamW for what is no matrix."""
    check_positive({"rms": rms})
    matrix = scale_by_m3(
        b1=b1, b2=b2, b3=b3, slow=slow, period=period, damping=damping, state_dtype=state_dtype
    )
    matrix = optax.chain(matrix, scale_by_shape(rms))
    return optax.chain(
        with_adam_for_the_rest(matrix, state_dtype=state_dtype, info=info),
        descend(learning_rate, weight_decay=weight_decay, info=info),
    )


def m3_printed(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = M3PrintedConfig.b1,
    b2: float = M3PrintedConfig.b2,
    b3: float = M3PrintedConfig.b3,
    slow: float = M3PrintedConfig.slow,
    period: int = M3PrintedConfig.period,
    eps: float = M3PrintedConfig.eps,
    state_dtype: StateDtype | None = None,
    weight_decay: float = 0.0,
    info: PyTree[ParamInfo] | None = None,
) -> optax.GradientTransformation:
    """See `scale_by_m3_printed` and `descend`; AdamW for what is no matrix."""
    matrix = scale_by_m3_printed(
        b1=b1, b2=b2, b3=b3, slow=slow, period=period, eps=eps, state_dtype=state_dtype
    )
    return optax.chain(
        with_adam_for_the_rest(matrix, state_dtype=state_dtype, info=info),
        descend(learning_rate, weight_decay=weight_decay, info=info),
    )


def _m3(
    add: Callable[[M3State, optax.Updates], tuple[optax.Updates, ...]],
    weigh: Callable[[Array, Array], Array],
    slow: float,
    period: int,
    state_dtype: StateDtype | None,
) -> optax.GradientTransformation:
    """The order of algorithm 1: the slow direction of a period is the one its predecessors left."""

    def init(params: optax.Params) -> M3State:
        return M3State(
            count=jnp.zeros((), jnp.int32),
            fast=zeros(params, state_dtype),
            second=wide_zeros(params),
            slow=zeros(params, state_dtype),
            direction=zeros(params, state_dtype),
        )

    def update(updates, state, params=None):
        del params
        wide = jax.tree.map(lambda g, v: g.astype(v.dtype), updates, state.second)
        fast, second, slower = add(state, wide)

        def combine(g: Array, o1: Array, o2: Array, v: Array) -> Array:
            return weigh(o1 + slow * o2, v).astype(g.dtype)

        moved = jax.tree.map(combine, updates, _orthogonal(fast), state.direction, second)
        count = state.count + 1
        direction = jax.lax.cond(
            count % period == 0,
            lambda: _cast_like(_orthogonal(slower), state.direction),
            lambda: state.direction,
        )
        fast, slower = _cast_like(fast, state.fast), _cast_like(slower, state.slow)
        return moved, M3State(count, fast, second, slower, direction)

    return optax.GradientTransformation(init, update)


def _orthogonal(tree: optax.Updates) -> optax.Updates:
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, newton_schulz_all(leaves))


def _cast_like(tree: optax.Updates, like: optax.Updates) -> optax.Updates:
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)
