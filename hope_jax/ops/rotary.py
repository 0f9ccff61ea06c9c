"""Rotary embedding, alone and with the projections whose queries and keys it turns."""

from collections.abc import Callable
from math import tau

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from hope_jax.ops.dispatch import Form, launch_refusal, pick, platform
from hope_jax.ops.linear import dense
from hope_jax.ops.pallas import rotary as kernels

Frequencies = Float[np.ndarray, " half_width"]
"""Radians by which each pair of features turns from one token to the next, in float64."""

FEWEST = 4096
"""Tokens that are worth launches of their own."""

_DIGIT = 4096


def rotary_angles(
    positions: Int[Array, " T"],
    width: int,
    base: float,
    scaling: Callable[[Frequencies], Frequencies] | None = None,
) -> Float[Array, "T half_width"]:
    """The angle by which rotary embedding turns each pair of features.

    Pair i turns by `base^(-2i / width)` a token, or by what `scaling` makes of that.

    A position is written in digits of base 4096 and each digit's turn is taken modulo a full
    one beforehand, in float64: position 10,000,000 is as exact as position 10.

    References:
      Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
    """
    frequency = base ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    frequency = frequency if scaling is None else scaling(frequency)
    angle = jnp.zeros((positions.shape[0], width // 2), jnp.float32)
    for power in range(3):
        turn = np.mod(frequency * float(_DIGIT) ** power, tau).astype(np.float32)
        digit = (positions // _DIGIT**power) % _DIGIT
        angle = angle + digit[:, None].astype(jnp.float32) * turn
    return angle


def rotate(x: Float[Array, "B T G K"], angle: Float[Array, "T half_width"]) -> Array:
    """Turns the feature pairs (i, i + K/2) of each token by its angles."""
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    first, second = jnp.split(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def rotary_projections(
    x: Float[Array, "B T D"],
    query: Float[Array, "D E"],
    key_value: Float[Array, "2 D F"],
    angle: Float[Array, "T half_width"],
    *,
    objective: str = "dot",
    form: str = "auto",
) -> tuple[Float[Array, "B T H K"], Float[Array, "B T G K"], Float[Array, "B T G K"]]:
    """Projects tokens to queries, keys and values in heads, of which the first two are turned.

    Args:
      x: The tokens.
      query: The weight of queries; E = H K.
      key_value: Those of keys and of values; F = G K.
      angle: By which each token's feature pairs (i, i + K/2) turn; K is twice their number.
      objective: What the weights learn by, see `hope_jax.ops.linear`.
      form: "auto", "pallas_triton" or "xla", which "auto" takes for fewer than `FEWEST` tokens.

    Returns:
      Queries, keys and values.
    """
    few = x.shape[0] * x.shape[1] < FEWEST
    form = "xla" if form == "auto" and few else form
    call = (x, query, key_value, angle, objective)
    return pick(FORMS, form, *call)(*call)


def _apart(x, query, key_value, angle, objective):
    width = 2 * angle.shape[1]
    both = dense(x, key_value, objective)
    parts = dense(x, query, objective), both[:, :, 0], both[:, :, 1]
    q, k, v = (_heads(part, width) for part in parts)
    return rotate(q, angle), rotate(k, angle), v


def _heads(x, width):
    return x.reshape(*x.shape[:2], -1, width)


def _refuses(x, query, key_value, angle, objective):
    del query, key_value
    reason = launch_refusal()
    if reason is not None:
        return reason
    if objective != "dot":
        return f"the gradient is that of the objective dot, got {objective}"
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the kernels take bfloat16 and float32, got {x.dtype}"
    return kernels.refusal(2 * angle.shape[1])


@jax.custom_vjp
def _together(x, query, key_value, angle):
    width, interpret = 2 * angle.shape[1], platform() != "gpu"
    turned = _heads(x @ _side_by_side(x.dtype, query, key_value[0]), width)
    v = _heads(x @ key_value[1].astype(x.dtype), width)
    heads = query.shape[1] // width
    return *kernels.turn(turned, jnp.cos(angle), jnp.sin(angle), heads, interpret=interpret), v


def _together_forward(x, query, key_value, angle):
    return _together(x, query, key_value, angle), (x, query, key_value, angle)


def _together_backward(residuals, slopes):
    x, query, key_value, angle = residuals
    interpret = platform() != "gpu"
    slope = kernels.turn_back(slopes, jnp.cos(angle), jnp.sin(angle), interpret=interpret)
    slope = slope.reshape(*x.shape[:2], -1)
    accumulate = jnp.promote_types(x.dtype, jnp.float32)
    owed = jnp.einsum("BTD,BTE->DE", x, slope, preferred_element_type=accumulate)
    owed = owed.astype(query.dtype)
    to_query, to_both = owed[:, : query.shape[1]], owed[:, query.shape[1] :]
    to_both = jnp.stack(jnp.split(to_both, 2, axis=1))
    return slope @ _side_by_side(x.dtype, query, *key_value).T, to_query, to_both, None


_together.defvjp(_together_forward, _together_backward)


def _side_by_side(dtype, *weights):
    return jnp.concatenate([weight.astype(dtype) for weight in weights], axis=1)


def _fused(x, query, key_value, angle, objective):
    del objective
    return _together(x, query, key_value, angle)


FORMS = {
    "pallas_triton": Form(_fused, _refuses, ("gpu",)),
    "xla": Form(_apart),
}
