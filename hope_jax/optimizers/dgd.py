"""Delta gradient descent and its generalisation: the weights' own memory of what to do."""

import logging
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from hope_jax.ops.linear import OBJECTIVES, Objective, objective_named
from hope_jax.optimizers.parameters import ParamInfo
from hope_jax.optimizers.standard import check_positive, descend, settings

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DGDConfig:
    """Delta gradient descent, see `dgd`.

    Attributes:
      key_norm: Length of a linear layer's input (lambda).
    """

    kind: Literal["dgd"] = "dgd"
    key_norm: float = 1.0

    def __post_init__(self):
        check_positive({"key_norm": self.key_norm})

    def build(
        self,
        learning_rate: optax.ScalarOrSchedule,
        *,
        weight_decay: float = 0.0,
        info: PyTree[ParamInfo] | None = None,
    ) -> optax.GradientTransformation:
        """Makes the optimizer, see `descend` for the arguments."""
        return dgd(learning_rate, **settings(self), weight_decay=weight_decay, info=info)


@dataclass(frozen=True, kw_only=True)
class GGDConfig:
    """Generalised gradient descent, see `ggd`.

    Attributes:
      objective: Of the memory, as `hope_jax.ops.linear` was given it.
      key_norm: Length of a linear layer's input (lambda).
    """

    kind: Literal["ggd"] = "ggd"
    objective: Literal["dot", "l2", "huber"] = "huber"
    key_norm: float = 1.0

    def __post_init__(self):
        objective_named(self.objective)
        check_positive({"key_norm": self.key_norm})

    def build(
        self,
        learning_rate: optax.ScalarOrSchedule,
        *,
        weight_decay: float = 0.0,
        info: PyTree[ParamInfo] | None = None,
    ) -> optax.GradientTransformation:
        """Makes the optimizer, see `descend` for the arguments."""
        return ggd(learning_rate, **settings(self), weight_decay=weight_decay, info=info)


class ProximalState(NamedTuple):
    """State of `scale_by_proximal_step`.

    Attributes:
      count: Steps so far, for the schedule.
    """

    count: Int[Array, ""]


def scale_by_proximal_step(
    learning_rate: optax.ScalarOrSchedule,
    *,
    objective: str | Objective = "l2",
    key_norm: float = DGDConfig.key_norm,
) -> optax.GradientTransformation:
    """Shortens the step so that a memory of keys of length `key_norm` cannot overshoot.

    The minimum of `objective(W x, u) + 1/(2 eta) |W - W_t|^2` is, for the objective "l2" and
    |x| = lambda, exactly a step of eta' = eta / (1 + eta lambda^2) along the gradient at W_t
    (Sherman-Morrison). "huber" and functions are taken to curve at most as much, "dot" does not
    curve, and its step stays.

    Args:
      learning_rate: eta, the same that follows in the chain.
      objective: What the gradients come from.
      key_norm: lambda.

    References:
      Behrouz et al., "Nested Learning", 2025, equations 56-57 and 112-121.
    """
    check_positive({"key_norm": key_norm})
    curvature = 0.0 if objective_named(objective) is OBJECTIVES["dot"] else key_norm**2

    def init(params: optax.Params) -> ProximalState:
        del params
        return ProximalState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        del params
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        share = 1 / (1 + rate * curvature)
        updates = jax.tree.map(lambda g: (g * share).astype(g.dtype), updates)
        return updates, ProximalState(state.count + 1)

    return optax.GradientTransformation(init, update)


def ggd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    objective: str | Objective = GGDConfig.objective,
    key_norm: float = GGDConfig.key_norm,
    weight_decay: float = 0.0,
    info: PyTree[ParamInfo] | None = None,
) -> optax.GradientTransformation:
    """Generalised gradient descent: a layer remembers its own targets by any objective.

        W <- argmin_W objective(W x, u) + 1/(2 eta) |W - W_t|^2,    u = -dloss/dy at W_t

    to first order around W_t, exactly for "dot" (gradient descent) and "l2" (delta gradient
    descent). The objective's gradient needs a layer's input, which no optimizer sees: layers that
    compute with `hope_jax.ops.linear.linear` put it into the gradient of their weight. All other
    parameters, and all of them in a model without such layers, are moved by plain gradient descent
    with the step of the chain; a warning says so when the optimizer is made.

    Args:
      learning_rate: eta; a number or a schedule.
      objective: The one the layers use.
      key_norm: Length of the layers' inputs, sqrt(width) after an RMS norm. Too small a number can
        overshoot, too large a one is slow.
      weight_decay: See `descend`.
      info: See `descend`.

    References:
      Behrouz et al., "Nested Learning", 2025, equations 54-60.
    """
    if objective_named(objective) is not OBJECTIVES["dot"]:
        _log.warning(
            "delta gradient descent moves weights of layers that use hope_jax.ops.linear (those of "
            "models with model.objective); what else there is moves by plain gradient descent"
        )
    return optax.chain(
        scale_by_proximal_step(learning_rate, objective=objective, key_norm=key_norm),
        descend(learning_rate, weight_decay=weight_decay, info=info),
    )


def dgd(
    learning_rate: optax.ScalarOrSchedule,
    *,
    key_norm: float = DGDConfig.key_norm,
    weight_decay: float = 0.0,
    info: PyTree[ParamInfo] | None = None,
) -> optax.GradientTransformation:
    """Delta gradient descent: `ggd` with the objective "l2".

        W <- W (I - eta' x x^T) - eta' dloss/dW,    eta' = eta / (1 + eta lambda^2)

    averaged over the tokens of a batch as the loss is. See `ggd` for where the first term comes
    from, and for what happens to parameters that are no linear layer's.
    """
    return ggd(
        learning_rate, objective="l2", key_norm=key_norm, weight_decay=weight_decay, info=info
    )
