"""The memory of stored pairs: a softmax over the last of them, the same in any split."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hope_jax.modules.nonparametric import NonparametricConfig

TIME, WIDTH = 14, 8
close = partial(chex.assert_trees_all_close, rtol=1e-4, atol=1e-5)


def build(**options):
    config = NonparametricConfig(heads=2, window=5, convolution=2, **options)
    return config.build(WIDTH, depth=1, key=jax.random.key(0))


def draw():
    starts = np.zeros((2, TIME), bool)
    starts[1, [6, 9]] = True
    return jax.random.normal(jax.random.key(1), (2, TIME, WIDTH)), jnp.asarray(starts)


def test_any_split_is_reading_whole():
    layer, (x, starts) = build(), draw()
    whole, end = layer(x, None, starts)
    memory, pieces = layer.initial_memory(2, jnp.dtype("float32")), []
    for cut in (slice(0, 7), slice(7, 8), slice(8, TIME)):
        y, memory = layer(x[:, cut], memory, starts[:, cut])
        pieces.append(y)
    close(jnp.concatenate(pieces, 1), whole)
    close(memory, end)


def test_no_token_sees_the_future_another_document_or_what_left_the_store():
    layer, (x, starts) = build(), draw()
    slope = jax.grad(lambda x, row, t: jnp.sum(layer(x, None, starts)[0][row, t] ** 2))
    gradient = slope(x, 0, 10)
    seen = np.abs(gradient[0]).max(-1) > 0
    # Five pairs, the first of which the convolution mixed with the token before.
    assert seen.tolist() == [5 <= t <= 10 for t in range(TIME)]
    np.testing.assert_array_equal(gradient[1], 0)
    assert (np.abs(slope(x, 1, 11)[1]).max(-1) > 0).tolist() == [9 <= t <= 11 for t in range(TIME)]


def test_a_sharp_memory_returns_the_value_of_the_key_it_is_asked_for():
    layer = build(sharpness=200.0)
    x, _ = draw()
    inputs, _, gate, _ = layer.frame.into(x, None, None)
    best = jnp.einsum("BTHK,BSHK->BHTS", *(_unit(inputs[name]) for name in "qk"))
    index = jnp.arange(TIME)
    seen = (index[:, None] >= index) & (index[:, None] - index < 5)
    chosen = jnp.argmax(jnp.where(seen, best, -2), -1)
    values = jnp.take_along_axis(
        inputs["v"], jnp.swapaxes(chosen, 1, 2)[..., None].repeat(4, -1), axis=1
    )
    wrong = np.abs(layer(x)[0] - layer.frame.back(values, gate)).max(-1)
    assert np.mean(wrong < 0.05) > 0.8


def test_every_parameter_receives_a_gradient():
    layer, (x, _) = build(), draw()
    graph, params = nnx.split(layer, nnx.Param)
    gradients = jax.grad(lambda p: jnp.sum(jnp.sin(nnx.merge(graph, p)(x)[0])))(params)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(gradients))


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        NonparametricConfig(window=0)
    with pytest.raises(ValueError, match=r"sharpness must be above 0, got 0\.0"):
        NonparametricConfig(sharpness=0.0)
    with pytest.raises(ValueError, match="head_width must be even, got 3"):
        NonparametricConfig(head_width=3)


def _unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
