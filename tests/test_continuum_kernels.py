"""The kernels of a level that learns in context, interpreted: they are the written function."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hope_jax.ops.continuum import Pace, continuum_level
from hope_jax.ops.pallas import continuum as kernels

ROWS, CHUNK, INPUTS, OUTPUTS = 2, 16, 16, 32
pytestmark = pytest.mark.usefixtures("x64")
close = partial(chex.assert_trees_all_close, rtol=1e-8, atol=1e-8)


def random_call(time, dtype=jnp.float64):
    """The arrays of a call, and document starts: a chunk's first token, and one or two inside."""
    random = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(random.normal(size=shape), dtype)  # noqa: E731
    x, values = normal(ROWS, time, INPUTS), normal(ROWS, time, OUTPUTS)
    weights = (0.2 * normal(1, INPUTS, OUTPUTS),)
    starts = np.zeros((ROWS, time), bool)
    starts[0, [0, 37]] = starts[1, [21, 29, 32]] = True
    wide = jnp.promote_types(dtype, jnp.float32)
    pace = Pace(rate=jnp.asarray(0.9, wide), retain=jnp.asarray(0.8, wide))
    return (x, values, weights, pace), jnp.asarray(starts)


def loss(arrays, starts, slope, form):
    y, after = continuum_level(*arrays, None, starts, chunk=CHUNK, form=form)
    deltas = sum(jnp.sum(jnp.sin(d)) for d in after.fast.delta)
    return jnp.sum(y * slope) + deltas, (y, after)


@pytest.fixture(autouse=True)
def tiles(monkeypatch):
    """Several programs for a level."""
    monkeypatch.setattr(kernels, "COLUMNS", 16)
    monkeypatch.setattr(kernels, "ROWS", 8)
    monkeypatch.setattr(kernels, "STEP", 8)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("time", [64, 55])
def test_kernels_are_the_reference_in_values_and_gradients(time, documents):
    arrays, starts = random_call(time)
    starts = starts if documents else None
    slope = jnp.asarray(np.random.default_rng(1).normal(size=arrays[1].shape))
    found = {
        form: jax.jit(jax.grad(partial(loss, form=form), has_aux=True))(arrays, starts, slope)
        for form in ("reference", "pallas_triton")
    }
    close(found["pallas_triton"], found["reference"])
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(found["pallas_triton"][0]))


def test_columns_whose_move_is_not_finite_leave_it_out():
    (x, values, *rest), _ = random_call(64)
    slope = jnp.ones_like(values)
    spoiled = values.at[0, 20, 3].set(jnp.inf)
    run = jax.jit(jax.grad(partial(loss, form="pallas_triton"), has_aux=True))
    slopes, (y, after) = run((x, spoiled, *rest), None, slope)
    assert after.fast.skipped.tolist() == [1, 0]
    assert after.fast.writes.tolist() == [3, 4]
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves((slopes, y, after)))
    still, (kept, _) = run((x, values, *rest), None, slope)
    close((y[1], y[0, :, 16:]), (kept[1], kept[0, :, 16:]))  # others than those of its program
    close(slopes[1][1], still[1][1])


@pytest.mark.parametrize("form", ["pallas_triton", "together"])
def test_in_bfloat16_a_level_is_the_reference_up_to_rounding(form):
    arrays, starts = random_call(64, jnp.bfloat16)
    slope = jnp.asarray(np.random.default_rng(1).normal(size=arrays[1].shape), jnp.bfloat16)
    exact = jax.tree.map(lambda a: a.astype(jnp.float64), arrays)
    run = jax.jit(jax.grad(loss, has_aux=True), static_argnums=3)
    expected = run(exact, starts, slope, "reference")
    with jax.enable_x64(False):
        found = run(arrays, starts, slope, form)
    # An answer goes through four roundings by 2^-9 of a number, of deltas, weighed errors, slow
    # answers and itself, and its gradient through as many again.
    for leaf, like in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(like.dtype, jnp.floating):
            error = np.linalg.norm(np.asarray(leaf, np.float64) - like)
            assert error <= 8 * 2.0**-9 * np.linalg.norm(like)


def test_nothing_is_said_of_kernels_where_they_would_be_slower(monkeypatch, caplog):
    monkeypatch.setattr("hope_jax.ops.dispatch.platform", lambda: "gpu")
    (x, values, weights, pace), _ = random_call(256)
    jax.eval_shape(partial(continuum_level, chunk=128), x, values, weights, pace)
    assert not caplog.records
