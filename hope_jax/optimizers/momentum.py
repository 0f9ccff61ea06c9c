"""Momenta that are a sum of gradients, with a choice before the sum and one behind it."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from hope_jax.ops.orthogonal import newton_schulz_all
from hope_jax.optimizers.parameters import (
    ParamInfo,
    from_matrices,
    to_matrices,
    with_info,
)
from hope_jax.optimizers.standard import (
    StateDtype,
    check_positive,
    check_shares,
    descend,
    scale_by_shape,
    settings,
    widened,
    with_adam_for_the_rest,
)

Matrices = Float[Array, "... out in"]
MatrixMap = Callable[[Matrices], Matrices]


def _tanh(x: Matrices) -> Matrices:
    """Of numbers in units of their matrix' root mean square, so that scale does not matter."""
    wide = x.astype(widened(x))
    square = jnp.sum(wide * wide, axis=(-2, -1), keepdims=True) / max(prod(x.shape[-2:]), 1)
    return jnp.tanh(wide * jax.lax.rsqrt(jnp.where(square > 0, square, 1.0))).astype(x.dtype)


MAPS: dict[str, MatrixMap] = {"identity": lambda x: x, "sign": jnp.sign, "tanh": _tanh}
"""Odd and rising functions of every number: what goes downhill still does behind them."""


@dataclass(frozen=True, kw_only=True)
class PreconditionedMomentumConfig:
    """Momentum of preconditioned gradients, see `preconditioned_momentum`.

    Attributes:
      decay: Share of the momentum that survives a step (alpha).
      preconditioner: "none", or "diagonal" as Adam's.
      b2: Share of the diagonal that survives a step.
      eps: Added to the root of the diagonal.
      state_dtype: Of the momentum; None for the parameters' own.
    """

    kind: Literal["preconditioned_momentum"] = "preconditioned_momentum"
    decay: float = 0.9
    preconditioner: Literal["none", "diagonal"] = "diagonal"
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
        return preconditioned_momentum(
            learning_rate, **settings(self), weight_decay=weight_decay, info=info
        )


@dataclass(frozen=True, kw_only=True)
class FeatureMomentumConfig:
    """Momentum of mapped gradients, see `feature_momentum`.

    Attributes:
      decay: Share of the momentum that survives a step (alpha).
      feature_map: One of "identity", "sign", "tanh".
      state_dtype: Of the momentum; None for the parameters' own.
    """

    kind: Literal["feature_momentum"] = "feature_momentum"
    decay: float = 0.9
    feature_map: Literal["identity", "sign", "tanh"] = "tanh"
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
        return feature_momentum(
            learning_rate, **settings(self), weight_decay=weight_decay, info=info
        )


@dataclass(frozen=True, kw_only=True)
class OutputMomentumConfig:
    """Momentum with a non-linear output, see `output_momentum`.

    Attributes:
      decay: Share of the momentum that survives a step (alpha).
      nonlinearity: "newton_schulz" (Muon), or elementwise "identity", "sign", "tanh".
      rms: Root mean square of a matrix's update behind Newton-Schulz, see `MuonConfig`.
      state_dtype: Of the momentum; None for the parameters' own.
    """

    kind: Literal["output_momentum"] = "output_momentum"
    decay: float = 0.95
    nonlinearity: Literal["newton_schulz", "identity", "sign", "tanh"] = "newton_schulz"
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
        return output_momentum(
            learning_rate, **settings(self), weight_decay=weight_decay, info=info
        )


def precondition(
    preconditioner: str | MatrixMap,
    *,
    b2: float,
    eps: float,
    info: PyTree[ParamInfo] | None,
) -> optax.GradientTransformation:
    """P of `P g`: "none", "diagonal" (1 / (sqrt(v) + eps), v a mean of g^2), or a function of g."""
    if callable(preconditioner):
        return matrix_map(preconditioner, info=info)
    if preconditioner == "none":
        return optax.identity()
    if preconditioner == "diagonal":
        return optax.scale_by_rms(b2, eps, eps_in_sqrt=False, bias_correction=True)
    raise ValueError(
        f"preconditioner must be none or diagonal, or a function, got {preconditioner!r}"
    )


def scale_by_preconditioned_momentum(
    decay: float = PreconditionedMomentumConfig.decay,
    *,
    preconditioner: str | MatrixMap = PreconditionedMomentumConfig.preconditioner,
    b2: float = PreconditionedMomentumConfig.b2,
    eps: float = PreconditionedMomentumConfig.eps,
    state_dtype: StateDtype | None = None,
    info: PyTree[ParamInfo] | None = None,
) -> optax.GradientTransformation:
    """Momentum that maps gradients to what a preconditioner makes of them.

        m <- alpha m + P g

    one step of the memory m with the objective `-<m g^T, P>` (the paper's m points downhill and has
    `- eta`). With P = 1 it is `optax.trace`.

    References:
      Behrouz et al., "Nested Learning", 2025, equations 46-47.
    """
    check_shares({"decay": decay, "b2": b2})
    check_positive({"eps": eps})
    return optax.chain(
        precondition(preconditioner, b2=b2, eps=eps, info=info),
        optax.trace(decay, accumulator_dtype=state_dtype),
    )


def scale_by_feature_momentum(
    decay: float = FeatureMomentumConfig.decay,
    *,
    feature_map: str | MatrixMap = FeatureMomentumConfig.feature_map,
    state_dtype: StateDtype | None = None,
    info: PyTree[ParamInfo] | None = None,
) -> optax.GradientTransformation:
    """Momentum whose keys pass a feature map.

        m <- alpha m + phi(g)

    with phi one of `MAPS`, or any function of matrices (stacked in front, out x in; see
    `parameters.to_matrices`); one that is not odd and rising may go uphill.

    References:
      Behrouz et al., "Nested Learning", 2025, equation 51.
    """
    check_shares({"decay": decay})
    return optax.chain(
        matrix_map(_named(feature_map, "feature_map"), info=info),
        optax.trace(decay, accumulator_dtype=state_dtype),
    )


def scale_by_output_momentum(
    decay: float = OutputMomentumConfig.decay,
    *,
    nonlinearity: str | MatrixMap = OutputMomentumConfig.nonlinearity,
    state_dtype: StateDtype | None = None,
    info: PyTree[ParamInfo] | None = None,
) -> optax.GradientTransformation:
    """Momentum read through a non-linearity.

        m <- alpha m + g,    update = sigma(m)

    with sigma one of `MAPS`, "newton_schulz" (which takes matrices alone), or any function of
    matrices (stacked in front, out x in).

    References:
      Behrouz et al., "Nested Learning", 2025, equation 52. Jordan, "Muon", 2024.
    """
    check_shares({"decay": decay})
    if nonlinearity == "newton_schulz":
        read = orthogonalize()
    else:
        read = matrix_map(_named(nonlinearity, "nonlinearity"), info=info)
    return optax.chain(optax.trace(decay, accumulator_dtype=state_dtype), read)


def orthogonalize() -> optax.GradientTransformation:
    """Sends the singular values of every matrix to about 1; all leaves must be matrices."""

    def update(updates: optax.Updates, _: optax.Params | None) -> optax.Updates:
        leaves, structure = jax.tree.flatten(updates)
        return jax.tree.unflatten(structure, newton_schulz_all(leaves))

    return optax.stateless(update)


def preconditioned_momentum(
    learning_rate: optax.ScalarOrSchedule,
    *,
    decay: float = PreconditionedMomentumConfig.decay,
    preconditioner: str | MatrixMap = PreconditionedMomentumConfig.preconditioner,
    b2: float = PreconditionedMomentumConfig.b2,
    eps: float = PreconditionedMomentumConfig.eps,
    state_dtype: StateDtype | None = None,
    weight_decay: float = 0.0,
    info: PyTree[ParamInfo] | None = None,
) -> optax.GradientTransformation:
    """See `scale_by_preconditioned_momentum` and `descend`."""
    momentum = scale_by_preconditioned_momentum(
        decay, preconditioner=preconditioner, b2=b2, eps=eps, state_dtype=state_dtype, info=info
    )
    return optax.chain(momentum, descend(learning_rate, weight_decay=weight_decay, info=info))


def feature_momentum(
    learning_rate: optax.ScalarOrSchedule,
    *,
    decay: float = FeatureMomentumConfig.decay,
    feature_map: str | MatrixMap = FeatureMomentumConfig.feature_map,
    state_dtype: StateDtype | None = None,
    weight_decay: float = 0.0,
    info: PyTree[ParamInfo] | None = None,
) -> optax.GradientTransformation:
    """See `scale_by_feature_momentum` and `descend`."""
    momentum = scale_by_feature_momentum(
        decay, feature_map=feature_map, state_dtype=state_dtype, info=info
    )
    return optax.chain(momentum, descend(learning_rate, weight_decay=weight_decay, info=info))


def output_momentum(
    learning_rate: optax.ScalarOrSchedule,
    *,
    decay: float = OutputMomentumConfig.decay,
    nonlinearity: str | MatrixMap = OutputMomentumConfig.nonlinearity,
    rms: float = OutputMomentumConfig.rms,
    state_dtype: StateDtype | None = None,
    weight_decay: float = 0.0,
    info: PyTree[ParamInfo] | None = None,
) -> optax.GradientTransformation:
    """See `scale_by_output_momentum` and `descend`.

    With Newton-Schulz it is Muon without Nesterov's look ahead, and AdamW for what is no matrix.
    """
    check_positive({"rms": rms})
    momentum = scale_by_output_momentum(
        decay, nonlinearity=nonlinearity, state_dtype=state_dtype, info=info
    )
    if nonlinearity == "newton_schulz":
        momentum = with_adam_for_the_rest(
            optax.chain(momentum, scale_by_shape(rms)), state_dtype=state_dtype, info=info
        )
    return optax.chain(momentum, descend(learning_rate, weight_decay=weight_decay, info=info))


def matrix_map(
    function: MatrixMap, *, info: PyTree[ParamInfo] | None
) -> optax.GradientTransformation:
    """Applies a function to all parameters as matrices that map inputs to outputs."""

    def apply(one: ParamInfo, x: Array) -> Array:
        return from_matrices(one, function(to_matrices(one, x)), x)

    return optax.stateless(lambda updates, _: with_info(apply, updates, info=info))


def _named(function: str | MatrixMap, name: str) -> MatrixMap:
    if callable(function):
        return function
    if function not in MAPS:
        raise ValueError(
            f"{name} must be one of {', '.join(MAPS)}, or a function, got {function!r}"
        )
    return MAPS[function]
