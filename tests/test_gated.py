"""Gated hidden units: their equation, and the kernel of their backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.ops.gated import hidden_units

KERNEL = "pallas_triton"


def projections(count=2, units=96, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(0), (2, 9, count, units), dtype)


def gradient(form, z, activation):
    return jax.jit(jax.grad(lambda z: jnp.sum(jnp.sin(hidden_units(z, activation, form=form)))))(z)


@pytest.mark.parametrize("activation", [jax.nn.silu, jax.nn.gelu, jax.nn.relu])
def test_a_second_projection_is_a_factor(activation):
    z = projections()
    np.testing.assert_allclose(
        hidden_units(z, activation), activation(z[:, :, 0]) * z[:, :, 1], rtol=1e-6, atol=1e-6
    )
    alone = hidden_units(z[:, :, :1], activation)
    np.testing.assert_allclose(alone, activation(z[:, :, 0]), rtol=1e-6, atol=1e-6)
    expected = gradient("xla", z, activation)
    np.testing.assert_allclose(gradient(KERNEL, z, activation), expected, rtol=1e-5, atol=1e-6)


def test_the_kernel_rounds_once():
    z = projections(units=32, dtype=jnp.bfloat16)
    slope = jnp.ones((2, 9, 32), jnp.bfloat16)

    def pull(form, z, slope):
        return jax.vjp(lambda z: hidden_units(z, jax.nn.silu, form=form), z)[1](slope)[0]

    exact = pull("xla", z.astype(jnp.float32), slope.astype(jnp.float32))
    found = pull(KERNEL, z, slope)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)


def test_the_kernel_says_what_it_does_not_take():
    with pytest.raises(ValueError, match="multiples of 32 units, got 48"):
        hidden_units(projections(units=48), jax.nn.silu, form=KERNEL)
