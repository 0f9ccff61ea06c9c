"""Newton-Schulz: singular values near 1, whatever the shape, the scale and the condition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from hope_jax.ops.orthogonal import newton_schulz, newton_schulz_all

SPECTRA = {
    "even in the logarithm": lambda n: np.geomspace(1, 1e-3, n),
    "even": lambda n: np.linspace(1, 1e-3, n),
    "one small": lambda n: np.r_[np.ones(n - 1), 1e-3],
    "one large": lambda n: np.r_[1, 1e-3 * np.ones(n - 1)],
    "half small": lambda n: np.r_[np.ones(n - n // 2), 1e-3 * np.ones(n // 2)],
    "equal": np.ones,
}


def with_spectrum(values, rows, columns, seed=0):
    """A matrix with given singular values and random singular vectors, and the vectors."""
    random = np.random.default_rng(seed)
    left = np.linalg.qr(random.normal(size=(rows, rows)))[0][:, : len(values)]
    right = np.linalg.qr(random.normal(size=(columns, columns)))[0][:, : len(values)]
    return (left * values) @ right.T, left, right


@pytest.mark.parametrize("shape", [(64, 64), (48, 160), (160, 48), (2, 300), (300, 3)])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_singular_values_end_near_one(spectrum, shape):
    x, _, _ = with_spectrum(SPECTRA[spectrum](min(shape)), *shape)
    values = np.linalg.svd(newton_schulz(jnp.asarray(x, jnp.float32)), compute_uv=False)
    assert values.min() >= 0.7
    assert values.max() <= 1.2


@pytest.mark.parametrize("spectrum", ["one small", "half small"])
def test_large_matrices_with_equal_singular_values_end_near_one(spectrum):
    # The hardest for the bound on the largest singular value, which the Frobenius norm fails.
    x, _, _ = with_spectrum(SPECTRA[spectrum](384), 384, 384)
    values = np.linalg.svd(newton_schulz(jnp.asarray(x, jnp.float32)), compute_uv=False)
    assert values.min() >= 0.7
    assert values.max() <= 1.2


@pytest.mark.parametrize("shape", [(64, 64), (48, 160), (160, 48)])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_bfloat16_matrices_end_near_one(spectrum, shape):
    # Rounding to bfloat16 moves small singular values: the condition is that of what was given.
    x, _, _ = with_spectrum(SPECTRA[spectrum](min(shape)), *shape)
    x = jnp.asarray(x, jnp.bfloat16)
    y = newton_schulz(x)
    assert y.dtype == jnp.bfloat16
    given = np.linalg.svd(np.asarray(x, np.float64), compute_uv=False)
    values = np.linalg.svd(np.asarray(y, np.float64), compute_uv=False)
    assert values[given >= 1e-3 * given[0]].min() >= 0.7
    assert values.max() <= 1.2


@pytest.mark.parametrize("shape", [(24, 24), (12, 40), (40, 12)])
def test_singular_vectors_stay(shape):
    x, left, right = with_spectrum(np.geomspace(1, 1e-2, min(shape)), *shape)
    core = left.T @ np.asarray(newton_schulz(jnp.asarray(x, jnp.float32)), np.float64) @ right
    np.testing.assert_allclose(core, np.diag(np.diag(core)), atol=2e-5)
    assert np.diag(core).min() >= 0.7


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
def test_scale_changes_nothing(scale):
    x = jax.random.normal(jax.random.key(0), (5, 16, 32))
    np.testing.assert_allclose(newton_schulz(x * scale), newton_schulz(x), rtol=1e-4, atol=1e-4)


def test_zero_stays_zero_and_empty_stays_empty():
    assert not newton_schulz(jnp.zeros((2, 8, 8))).any()
    assert newton_schulz(jnp.zeros((0, 8))).shape == (0, 8)


def test_a_stack_is_its_matrices():
    x = jax.random.normal(jax.random.key(0), (2, 3, 8, 16)) * 10.0 ** jnp.arange(3)[:, None, None]
    one_by_one = [[newton_schulz(y) for y in row] for row in x]
    np.testing.assert_allclose(newton_schulz(x), jnp.array(one_by_one), rtol=1e-4, atol=1e-4)


def some_stacks():
    shapes = [(3, 8, 16), (16, 8), (8, 8), (2, 2, 8, 16)]
    return [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]


def test_batching_over_equal_shapes_changes_nothing():
    for joined, alone in zip(newton_schulz_all(some_stacks()), some_stacks(), strict=True):
        np.testing.assert_allclose(joined, newton_schulz(alone), rtol=1e-4, atol=1e-4)


def test_devices_share_the_matrices_and_change_nothing():
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    x = jax.random.normal(jax.random.key(0), (16, 8, 32))
    with jax.set_mesh(mesh):
        split = jax.device_put(x, NamedSharding(mesh, PartitionSpec(None, None, "fsdp")))
        compiled = jax.jit(newton_schulz_all).lower([split]).compile()
        (y,) = compiled([split])
        others = jax.jit(newton_schulz_all)(some_stacks())
    np.testing.assert_allclose(y, newton_schulz(x), rtol=1e-4, atol=1e-4)
    for joined, alone in zip(others, some_stacks(), strict=True):
        np.testing.assert_allclose(joined, newton_schulz(alone), rtol=1e-4, atol=1e-4)
    one_device = jax.jit(newton_schulz).lower(x).compile().cost_analysis()["flops"]
    assert compiled.cost_analysis()["flops"] < one_device / 8 * 1.1
