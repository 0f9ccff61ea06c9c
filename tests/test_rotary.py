"""Rotary embedding: its equation, and the kernels that project and turn queries and keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from described import lowered_for

from hope_jax.ops.rotary import FEWEST, rotary_angles, rotary_projections, rotate

KERNEL = "pallas_triton"


def draw(time=13, heads=4, groups=2, width=32, dtype=jnp.float32, batch=2):
    keys = jax.random.split(jax.random.key(time), 4)
    x = jax.random.normal(keys[0], (batch, time, 24), dtype)
    query = 0.2 * jax.random.normal(keys[1], (24, heads * width))
    both = 0.2 * jax.random.normal(keys[2], (2, 24, groups * width))
    return x, query, both, rotary_angles(7 + jnp.arange(time), width, 50.0)


def values_and_gradients(form, x, query, both, angle):
    def read(x, query, both):
        return rotary_projections(x, query, both, angle, form=form)

    def run(x, query, both):
        out, pull = jax.vjp(read, x, query, both)
        return out, pull(tuple(jnp.sin(3 * part + n).astype(x.dtype) for n, part in enumerate(out)))

    return jax.jit(run)(x, query, both)


def close(found, expected, share):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        size = np.abs(b).max()
        np.testing.assert_allclose(np.asarray(a, np.float64) / size, b / size, rtol=0, atol=share)


def test_a_pair_of_features_is_a_complex_number_that_turns():
    x = jax.random.normal(jax.random.key(0), (2, 13, 3, 8))
    angle = rotary_angles(jnp.arange(13), 8, 50.0)
    pairs = np.asarray(x[..., :4] + 1j * x[..., 4:])
    turned = pairs * np.exp(1j * np.arange(13)[:, None, None] * 50.0 ** (-np.arange(4) / 4))
    expected = np.concatenate([turned.real, turned.imag], axis=-1)
    np.testing.assert_allclose(rotate(x, angle), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("time", "heads", "groups", "width"),
    [(13, 4, 2, 32), (24, 3, 3, 16), (7, 6, 2, 64), (256, 16, 16, 64), (5, 1, 1, 16)],
)
def test_the_kernels_are_the_reference(time, heads, groups, width):
    call = draw(time, heads, groups, width)
    with jax.default_matmul_precision("highest"):
        close(values_and_gradients(KERNEL, *call), values_and_gradients("xla", *call), 2e-6)


def test_the_kernels_round_once():
    x, *others = draw(dtype=jnp.bfloat16)
    found = values_and_gradients(KERNEL, x, *others)
    exact = values_and_gradients("xla", x.astype(jnp.float32), *others)
    assert {leaf.dtype for leaf in jax.tree.leaves((found[0], found[1][0]))} == {x.dtype}
    assert {leaf.dtype for leaf in jax.tree.leaves(found[1][1:])} == {jnp.dtype("float32")}
    close(found, exact, 2e-2)


def test_the_kernels_say_what_they_do_not_take():
    with pytest.raises(ValueError, match="16 to 256 features, a power of two, got 24"):
        rotary_projections(*draw(width=24), form=KERNEL)
    with pytest.raises(ValueError, match="objective dot, got l2"):
        rotary_projections(*draw(), objective="l2", form=KERNEL)


@pytest.mark.parametrize("time", [FEWEST // 2, FEWEST])
def test_a_gpu_takes_the_kernels_for_many_tokens(time):
    *call, angle = draw(time, dtype=jnp.bfloat16, batch=1)

    def loss(*call):
        return sum(jnp.sum(part**2) for part in rotary_projections(*call, angle))

    text = lowered_for("NVIDIA H100", jax.grad(loss, (0, 1, 2)), *call)
    assert ('"rotary_backward"' in text) == (time == FEWEST)
