"""Hidden units of which a second projection may be a factor, as in SwiGLU."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from hope_jax.ops.dispatch import Form, launch_refusal, pick, platform
from hope_jax.ops.linear import apart
from hope_jax.ops.pallas import gated as kernels


def hidden_units(
    z: Float[Array, "B T P F"], activation: Callable[[Array], Array], *, form: str = "auto"
) -> Float[Array, "B T F"]:
    """Returns `activation(z_0)`, or of two projections `activation(z_0) * z_1`.

    Args:
      z: One or two projections of the tokens.
      activation: Is applied to each number.
      form: How the gradient of two is computed: "auto", "pallas_triton" or "xla".

    References:
      Shazeer, "GLU Variants Improve Transformer", 2020.
    """
    if z.shape[2] == 1:
        return activation(z[:, :, 0])
    return pick(FORMS, form, z, activation)(z, activation)


def _units(z, activation):
    first, factor = apart(z, 2)
    return activation(first) * factor


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _fused(z, activation):
    return _units(z, activation)


def _forward(z, activation):
    return _units(z, activation), z


def _backward(activation, z, slope):
    flat = z.reshape(-1, *z.shape[2:]), slope.reshape(-1, slope.shape[-1])
    dz = kernels.backward(activation, *flat, interpret=platform() != "gpu")
    return (dz.reshape(z.shape),)


_fused.defvjp(_forward, _backward)


def _refuses(z, activation):
    del activation
    reason = launch_refusal()
    if reason is not None:
        return reason
    if z.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the kernel takes bfloat16 and float32, got {z.dtype}"
    return kernels.refusal(z.shape[-1])


FORMS = {
    "pallas_triton": Form(_fused, _refuses, ("gpu",)),
    "xla": Form(_units),
}
