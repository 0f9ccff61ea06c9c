"""The outer clock of the continuum memory system: each level moves at a frequency of its own."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from hope_jax.optimizers.parameters import ParamInfo, with_info

Reduce = Literal["mean", "sum"]

_FROZEN = 0


@dataclass(frozen=True, kw_only=True)
class LevelsConfig:
    """How often the levels of a model move.

    Attributes:
      periods: Optimizer steps between two moves of level 0, 1, ..., null for a level that is
        frozen; parameters without a level move at every step.
      reduce: What a move sees of the gradients since the last one: their "mean" or their "sum".
    """

    periods: tuple[int | None, ...]
    reduce: Reduce = "mean"

    def __post_init__(self):
        levels(lambda _: optax.identity(), self.periods, reduce=self.reduce)


class EveryState(NamedTuple):
    """State of `every`.

    Attributes:
      count: Steps since the last move.
      total: Sum of their gradients, in float32.
      inner: The wrapped optimizer's state.
    """

    count: Int[Array, ""]
    total: optax.Updates
    inner: optax.OptState


def every(
    inner: optax.GradientTransformation, period: int, *, reduce: str = "mean"
) -> optax.GradientTransformationExtraArgs:
    """Lets an optimizer act at steps `period`, `2 period`, ... on the gradients in between.

    At all other steps it is not computed, parameters keep every bit, and so does its state: the
    update is -0.0, the one number that leaves 0.0 and -0.0 alone. (`optax.MultiSteps` computes the
    inner optimizer at every step, and a gradient that is not finite passes its mask.)

    Args:
      inner: A whole optimizer, with its weight decay and learning rate. Its own step count is that
        of its moves.
      period: Steps from one move to the next.
      reduce: "mean" or "sum" of the gradients; optimizers that normalise do not see a difference.

    Returns:
      `inner` itself where `period` is 1.
    """
    _check(period, reduce)
    inner = optax.with_extra_args_support(inner)
    if period == 1:
        return inner

    def init(params: optax.Params) -> EveryState:
        total = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=_wide(p)), params)
        return EveryState(jnp.zeros((), jnp.int32), total, inner.init(params))

    def update(updates, state, params=None, **extra):
        count = state.count + 1
        total = jax.tree.map(jnp.add, state.total, updates)
        share = 1 / period if reduce == "mean" else 1.0

        def move(total, old):
            grads = jax.tree.map(lambda t, g: (t * share).astype(g.dtype), total, updates)
            moved, new = inner.update(grads, old, params, **extra)
            return moved, EveryState(
                jnp.zeros_like(count), jax.tree.map(jnp.zeros_like, total), new
            )

        def rest(total, old):
            return jax.tree.map(_still, shapes), EveryState(count, total, old)

        shapes = jax.eval_shape(move, total, state.inner)[0]
        return jax.lax.cond(count == period, move, rest, total, state.inner)

    return optax.GradientTransformationExtraArgs(init, update)


def frozen() -> optax.GradientTransformation:
    """Keeps every bit of its parameters and has no state."""

    def update(updates, state, params=None):  # noqa: ARG001 (optax's signature)
        return jax.tree.map(_still, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)  # noqa: ARG005


def levels(
    inner: Callable[[int], optax.GradientTransformation],
    periods: Sequence[int | None],
    *,
    reduce: str = "mean",
    info: PyTree[ParamInfo] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Lets the parameters of level l move every `periods[l]` optimizer steps.

        theta_l <- theta_l - step(sum of the gradients since its last move)   if t = 0 mod period_l
        theta_l <- theta_l                                                    otherwise

    with `step` any optimizer. Levels of one period share one optimizer; the state of each holds its
    own parameters alone, one buffer for each.

    Args:
      inner: Called with a period, returns the whole optimizer for parameters that move so often
        (so that a schedule can be stretched: see `stretched`). Often `lambda _: optimizer`.
      periods: Of level 0, 1, ...; None freezes a level.
      reduce: "mean" or "sum" of the gradients between two moves.
      info: Metadata that says which level a parameter belongs to; those of level None, and all
        where `info` is None, move at every step.

    Raises:
      ValueError: A period below 1; when initialised, a parameter of a level without a period.

    References:
      Behrouz et al., "Nested Learning", 2025, equation 71.
    """
    moving = {1, *(period for period in periods if period is not None)}
    for period in moving:
        _check(period, reduce)

    def label(one: ParamInfo, _: Array) -> int:
        if one.level is None:
            return 1
        if not 0 <= one.level < len(periods):
            raise ValueError(
                f"periods must have one entry for each level, got {len(periods)} entries "
                f"and a parameter of level {one.level}"
            )
        return periods[one.level] or _FROZEN

    rules: dict[Hashable, optax.GradientTransformation] = {
        period: every(inner(period), period, reduce=reduce) for period in moving
    }
    if None in periods:
        rules[_FROZEN] = frozen()
    return optax.partition(
        rules,
        lambda tree: with_info(label, tree, info=info),
    )


def stretched(schedule: optax.Schedule, period: int) -> optax.Schedule:
    """Reads a schedule of steps at moves: the n-th move happens in step `n period - 1`, from 0."""
    return lambda moves: schedule((moves + 1) * period - 1)


def _check(period: int, reduce: str) -> None:
    if period < 1:
        raise ValueError(f"period must be at least 1, got {period}")
    if reduce not in ("mean", "sum"):
        raise ValueError(f"reduce must be mean or sum, got {reduce!r}")


def _still(x: Array | jax.ShapeDtypeStruct) -> Array:
    """An update that moves nothing."""
    return jnp.full(x.shape, -0.0, x.dtype)


def _wide(x: Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)
