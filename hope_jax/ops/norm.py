"""Division by the root mean square, with what is next to it: a residual sum, or a gate."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hope_jax.ops.dispatch import Form, launch_refusal, pick, platform
from hope_jax.ops.pallas import norm as kernels

FEWEST = 4096
"""Rows that are worth a launch of their own: XLA puts the norms of few into its other launches."""


def rms_norm(
    x: Float[Array, "... D"], scale: Float[Array, " D"], *, epsilon: float
) -> Float[Array, "... D"]:
    """Divides by the root mean square over the last axis.

        y = scale * x / sqrt(mean(x^2) + epsilon)

    Args:
      x: What to normalize; in float32, whatever it is.
      scale: Multiplies each feature.
      epsilon: Keeps zeros from being divided by zero.

    Returns:
      y, in the dtype of `x`.
    """
    return _normalize(x, scale, epsilon)


def add_norm(
    x: Float[Array, "... D"],
    y: Float[Array, "... D"] | None,
    scale: Float[Array, " D"],
    *,
    epsilon: float,
    form: str = "auto",
) -> tuple[Float[Array, "... D"], Float[Array, "... D"]]:
    """Returns `x + y` and the `rms_norm` of it.

    What both answers are owed comes back as one gradient, for x and for y: a kernel that finds it
    has read the stream once.

    Args:
      x: The residual stream.
      y: What is added to it; None for nothing, so that the first answer is x.
      scale: As for `rms_norm`.
      epsilon: As there.
      form: "auto", "pallas_triton" or "xla", which "auto" takes for fewer than `FEWEST` rows.
    """
    call = (x, y, scale, epsilon)
    return pick(ADD_NORM, _chosen(form, x), *call)(*call)


def gated_norm(
    y: Float[Array, "... H D"],
    gate: Float[Array, "... E"],
    scale: Float[Array, " D"],
    *,
    epsilon: float,
    whole: Float[Array, "... P E"] | None = None,
    form: str = "auto",
) -> Float[Array, "... E"]:
    """Returns `rms_norm(y) * silu(gate)`, with the heads of y side by side.

    Args:
      y: What each head says.
      gate: Before its SiLU; E = H D.
      scale: As for `rms_norm`, of every head.
      epsilon: As there.
      whole: What the gate is the last part of, if it is: a kernel reads it there, and nobody needs
        to copy it. It gets no gradient: that is the gate's.
      form: As for `add_norm`.
    """
    call = (y, gate, scale, epsilon, whole)
    return pick(GATED_NORM, _chosen(form, y), *call)(*call)


# The backward pass measures `x` again: kept numbers would cost the forward one a second reading.
@partial(jax.checkpoint, static_argnums=2)
def _normalize(x, scale, epsilon):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = jnp.mean(wide * wide, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean + epsilon) * scale).astype(x.dtype)


def _add_norm(x, y, scale, epsilon):
    total = x if y is None else x + y
    return total, _normalize(total, scale, epsilon)


def _fused_add_norm(x, y, scale, epsilon):
    parts = tuple(_in_rows(part, scale) for part in (x, y) if part is not None)
    total, normed = _added(parts, scale, epsilon)
    return total.reshape(x.shape), normed.reshape(x.shape)


def _gated_norm(y, gate, scale, epsilon, whole):
    del whole
    return _normalize(y, scale, epsilon).reshape(gate.shape) * jax.nn.silu(gate)


def _fused_gated_norm(y, gate, scale, epsilon, whole):
    whole = gate[..., None, :] if whole is None else whole
    return _gated(y, gate, scale, whole, epsilon)


def _in_rows(x, scale):
    return x.reshape(-1, scale.shape[0])


def _refuses(x, other, scale, *others):
    del others
    reason = launch_refusal()
    if reason is not None:
        return reason
    if other is not None and other.dtype != x.dtype:
        return f"the kernels take arrays of one dtype, got {x.dtype} and {other.dtype}"
    return kernels.refusal(scale.shape[0], x.dtype)


def _chosen(form, x):
    return "xla" if form == "auto" and x.size // x.shape[-1] < FEWEST else form


ADD_NORM = {
    "pallas_triton": Form(_fused_add_norm, _refuses, ("gpu",)),
    "xla": Form(_add_norm),
}
GATED_NORM = {
    "pallas_triton": Form(_fused_gated_norm, _refuses, ("gpu",)),
    "xla": Form(_gated_norm),
}


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _added(parts, scale, epsilon):
    return kernels.add_norm(parts, scale, epsilon, interpret=platform() != "gpu")


def _added_forward(parts, scale, epsilon):
    total, normed = _added(parts, scale, epsilon)
    return (total, normed), (total, scale, (None,) * len(parts))


def _added_backward(epsilon, residuals, slopes):
    total, scale, parts = residuals
    interpret = platform() != "gpu"
    slope, owed = kernels.add_norm_backward(total, scale, slopes, epsilon, interpret=interpret)
    return (slope,) * len(parts), owed


_added.defvjp(_added_forward, _added_backward)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _gated(y, gate, scale, whole, epsilon):
    rows, parts = _in_rows(y, scale), whole.reshape(-1, *whole.shape[-2:])
    out = kernels.gated_norm(rows, parts, scale, epsilon, interpret=platform() != "gpu")
    return out.reshape(gate.shape)


def _gated_forward(y, gate, scale, whole, epsilon):
    return _gated(y, gate, scale, whole, epsilon), (y, scale, whole)


def _gated_backward(epsilon, residuals, slope):
    y, scale, whole = residuals
    to_y, to_gate, to_scale = kernels.gated_norm_backward(
        _in_rows(y, scale),
        whole.reshape(-1, *whole.shape[-2:]),
        scale,
        _in_rows(slope, scale),
        epsilon,
        interpret=platform() != "gpu",
    )
    return to_y.reshape(y.shape), to_gate.reshape(slope.shape), to_scale, None


_gated.defvjp(_gated_forward, _gated_backward)
