"""Momenta that solve a regression on all gradients so far: Adam and AdaGrad as memories."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from hope_jax.optimizers.parameters import ParamInfo, each, is_matrix, with_info
from hope_jax.optimizers.standard import (
    StateDtype,
    check_positive,
    check_shares,
    descend,
    divide,
    settings,
    wide_zeros,
    widened,
    zeros,
)

Target = Callable[[Array], Array]


@dataclass(frozen=True, kw_only=True)
class AdamMemoryConfig:
    """Adam, derived as a memory of gradients, see `adam_memory`.

    Attributes:
      target: What the memory is to answer: the "root" of the sum of g^2 (Adam), or the "sum"
        (momentum).
      b1: Share of the sum of gradients that survives a step.
      b2: Share of the sum of their squares that survives a step.
      eps: How strongly the answer is held small (lambda).
      state_dtype: Of the sum of gradients; None for the parameters' own.
    """

    kind: Literal["adam_memory"] = "adam_memory"
    target: Literal["root", "sum"] = "root"
    b1: float = 0.9
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
        return adam_memory(learning_rate, **settings(self), weight_decay=weight_decay, info=info)


@dataclass(frozen=True, kw_only=True)
class OuterMemoryConfig:
    """AdaGrad with momentum on whole rows or columns, see `outer_memory`.

    Attributes:
      b1: Share of the momentum that survives a step.
      eps: Smallest eigenvalue that is believed, as a share of the largest.
      refresh: Steps between two inversions; all steps before the first `refresh` have their own.
      largest: Matrices whose shorter side is longer go by element.
      state_dtype: Of the momentum; None for the parameters' own.
    """

    kind: Literal["outer_memory"] = "outer_memory"
    b1: float = 0.9
    eps: float = 1e-6
    refresh: int = 1
    largest: int = 1024
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
        return outer_memory(learning_rate, **settings(self), weight_decay=weight_decay, info=info)


class AdamMemoryState(NamedTuple):
    """State of `scale_by_adam_memory`.

    Attributes:
      count: Steps so far.
      first: Mean of gradients (the regression's correlation of keys with 1).
      second: Mean of their squares (the regression's correlation of keys with keys).
    """

    count: Int[Array, ""]
    first: optax.Updates
    second: optax.Updates


class OuterMemoryState(NamedTuple):
    """State of `scale_by_outer_memory`.

    Attributes:
      count: Steps so far.
      first: Mean of gradients.
      outer: Sum of g^T g over the shorter side of a matrix; of g^2 for what goes by element.
      root: The inverse square root of `outer` when it was last taken; scalars by element.
    """

    count: Int[Array, ""]
    first: optax.Updates
    outer: PyTree[Array]
    root: PyTree[Array]


def _root(second: Array) -> Array:
    return jnp.sqrt(second)


TARGETS: dict[str, Target] = {"root": _root, "sum": lambda second: second}
"""The paper's P as a function of the (mean) square of gradients."""


def scale_by_adam_memory(
    *,
    target: str | Target = AdamMemoryConfig.target,
    b1: float = AdamMemoryConfig.b1,
    b2: float = AdamMemoryConfig.b2,
    eps: float = AdamMemoryConfig.eps,
    state_dtype: StateDtype | None = None,
) -> optax.GradientTransformation:
    """The element-wise memory that answers every past gradient with P, solved exactly.

        m* = argmin_m sum_i (m g_i - P)^2 + lambda m^2 = P M / (H + lambda),
        M = sum_i g_i,    H = sum_i g_i^2

    with sums that fade (b1, b2) and are corrected for their start, and lambda = eps sqrt(H), which
    has the units of H. P = sqrt(H) gives M / (sqrt(H) + eps): Adam. P = H gives M: momentum.

    Args:
      target: "root", "sum", or P as a function of H.
      b1: Share of M that survives a step.
      b2: Share of H that survives a step.
      eps: See above.
      state_dtype: Of M.

    References:
      Behrouz et al., "Nested Learning", 2025, equations 101-105.
    """
    check_shares({"b1": b1, "b2": b2})
    check_positive({"eps": eps})
    if not callable(target) and target not in TARGETS:
        raise ValueError(f"target must be root or sum, or a function, got {target!r}")
    answer = target if callable(target) else TARGETS[target]

    def init(params: optax.Params) -> AdamMemoryState:
        count = jnp.zeros((), jnp.int32)
        return AdamMemoryState(count, zeros(params, state_dtype), wide_zeros(params))

    def update(updates, state, params=None):
        del params
        count = state.count + 1

        def one(_: ParamInfo, g: Array, first: Array, second: Array) -> tuple:
            wide = g.astype(widened(g))
            new_first = b1 * first + (1 - b1) * wide
            new_second = b2 * second + (1 - b2) * jnp.square(wide)
            keys, squares = new_first / (1 - b1**count), new_second / (1 - b2**count)
            # m* with lambda in it, and one root of H cancelled so that tiny gradients survive.
            root = jnp.sqrt(squares)
            memory = keys * divide(answer(squares), root) / (root + eps)
            return memory.astype(g.dtype), new_first.astype(first.dtype), new_second

        updates, first, second = each(3, one, updates, state.first, state.second)
        return updates, AdamMemoryState(count, first, second)

    return optax.GradientTransformation(init, update)


def scale_by_outer_memory(
    *,
    b1: float = OuterMemoryConfig.b1,
    eps: float = OuterMemoryConfig.eps,
    refresh: int = OuterMemoryConfig.refresh,
    largest: int = OuterMemoryConfig.largest,
    state_dtype: StateDtype | None = None,
    info: PyTree[ParamInfo] | None = None,
) -> optax.GradientTransformation:
    """The memory of whole gradients that answers with P, solved exactly.

        m* = M H^-1 P = M H^(-1/2),    H = sum_i g_i^T g_i,    P = H^(1/2)

    AdaGrad with momentum: M is a fading mean of gradients, corrected for its start, and H never
    fades. Keys are the rows of g, or the columns if those are shorter, so that H is the smaller of
    the two outer products; the rows of an embedding share one H. What is no matrix, and matrices
    with both sides above `largest`, take g^2 for the outer product: AdaGrad by element.

    Args:
      b1: Share of M that survives a step; 0 is AdaGrad.
      eps: Eigenvalues of H below this share of the largest count as that share.
      refresh: The inverse root is taken by `eigh`, which dominates the cost: every `refresh` steps.
        It is also taken in each of the first `refresh` steps, when new gradients still bring new
        directions.
      largest: See above.
      state_dtype: Of M.
      info: See `descend`.

    References:
      Behrouz et al., "Nested Learning", 2025, equations 106-111. Duchi et al., "Adaptive
      subgradient methods", 2011.
    """
    check_shares({"b1": b1})
    check_positive({"eps": eps, "refresh": refresh, "largest": largest})

    def whole(one: ParamInfo, x: Array) -> bool:
        rows = one.role == "embedding" and x.size > 0
        return (rows or is_matrix(one, x)) and min(x.shape[-2:]) <= largest

    def init(params: optax.Params) -> OuterMemoryState:
        def outer(one: ParamInfo, x: Array) -> Array:
            if not whole(one, x):
                return jnp.zeros_like(x, dtype=widened(x))
            short = min(x.shape[-2:])
            return jnp.zeros((*x.shape[:-2], short, short), widened(x))

        def root(one: ParamInfo, x: Array) -> Array:
            return outer(one, x) if whole(one, x) else jnp.zeros((), jnp.float32)

        return OuterMemoryState(
            jnp.zeros((), jnp.int32),
            zeros(params, state_dtype),
            with_info(outer, params, info=info),
            with_info(root, params, info=info),
        )

    def update(updates, state, params=None):
        del params
        count = state.count + 1
        due = (state.count % refresh == 0) | (state.count < refresh)

        def one(info: ParamInfo, g: Array, first: Array, outer: Array, root: Array) -> tuple:
            wide = g.astype(outer.dtype)
            new = b1 * first + (1 - b1) * wide
            mean = new / (1 - b1**count)
            if not whole(info, g):
                outer = outer + jnp.square(wide)
                update = divide(mean, jnp.sqrt(outer))
            elif g.shape[-2] < g.shape[-1]:
                outer = outer + wide @ wide.mT
                root = jax.lax.cond(due, lambda: _inverse_root(outer, eps), lambda: root)
                update = root @ mean
            else:
                outer = outer + wide.mT @ wide
                root = jax.lax.cond(due, lambda: _inverse_root(outer, eps), lambda: root)
                update = mean @ root
            return update.astype(g.dtype), new.astype(first.dtype), outer, root

        updates, *rest = each(4, one, updates, *state[1:], info=info)
        return updates, OuterMemoryState(count, *rest)

    return optax.GradientTransformation(init, update)


def adam_memory(
    learning_rate: optax.ScalarOrSchedule,
    *,
    target: str | Target = AdamMemoryConfig.target,
    b1: float = AdamMemoryConfig.b1,
    b2: float = AdamMemoryConfig.b2,
    eps: float = AdamMemoryConfig.eps,
    state_dtype: StateDtype | None = None,
    weight_decay: float = 0.0,
    info: PyTree[ParamInfo] | None = None,
) -> optax.GradientTransformation:
    """See `scale_by_adam_memory` and `descend`."""
    memory = scale_by_adam_memory(target=target, b1=b1, b2=b2, eps=eps, state_dtype=state_dtype)
    return optax.chain(memory, descend(learning_rate, weight_decay=weight_decay, info=info))


def outer_memory(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = OuterMemoryConfig.b1,
    eps: float = OuterMemoryConfig.eps,
    refresh: int = OuterMemoryConfig.refresh,
    largest: int = OuterMemoryConfig.largest,
    state_dtype: StateDtype | None = None,
    weight_decay: float = 0.0,
    info: PyTree[ParamInfo] | None = None,
) -> optax.GradientTransformation:
    """See `scale_by_outer_memory` and `descend`."""
    memory = scale_by_outer_memory(
        b1=b1, eps=eps, refresh=refresh, largest=largest, state_dtype=state_dtype, info=info
    )
    return optax.chain(memory, descend(learning_rate, weight_decay=weight_decay, info=info))


def _inverse_root(outer: Float[Array, "... N N"], eps: float) -> Float[Array, "... N N"]:
    """H^(-1/2), with eigenvalues below `eps` times the largest raised to that; 0 where H is 0."""

    @jax.custom_batching.sequential_vmap
    def one(outer: Float[Array, "N N"]) -> Float[Array, "N N"]:
        values, vectors = jnp.linalg.eigh(outer)
        values = jnp.maximum(values, eps * values[-1:])
        roots = jnp.where(values > 0, jax.lax.rsqrt(jnp.where(values > 0, values, 1)), 0)
        return (vectors * roots) @ vectors.T

    # One after the other: batches of decompositions can wait for each other for ever on a CPU.
    return jax.vmap(one)(outer.reshape(-1, *outer.shape[-2:])).reshape(outer.shape)
