"""The causal convolution and the leaky average: their equations, streams and documents."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from hope_jax.modules.layers import Convolution
from hope_jax.ops.convolution import causal_convolution, mixed_parts
from hope_jax.ops.leaky import leaky_average

BATCH, TIME, WIDTH = 2, 11, 3
KERNEL = "pallas_triton"


def convolution_by_hand(x, kernel, memory, starts):
    window = len(kernel)
    y, lines = np.zeros_like(x), []
    for row in range(len(x)):
        line = list(memory[row])
        for t in range(x.shape[1]):
            if starts[row, t]:
                line = [np.zeros_like(x[row, t])] * len(line)
            line.append(x[row, t])
            y[row, t] = sum(kernel[back] * line[-1 - back] for back in range(window))
        lines.append(line[len(line) - window + 1 :])
    return y, np.asarray(lines).reshape(len(x), window - 1, x.shape[2])


def average_by_hand(x, retain, memory, starts):
    averages, state = np.zeros_like(x), memory
    for t in range(x.shape[1]):
        state = np.where(starts[:, t, None], 0, state)
        state = averages[:, t] = retain * state + (1 - retain) * x[:, t]
    return averages, state


def random_call(op, time=TIME, window=4):
    random = np.random.default_rng(time)
    x = random.normal(size=(BATCH, time, WIDTH))
    starts = random.random(size=(BATCH, time)) < 0.3
    if op is causal_convolution:
        shapes = (window, WIDTH), (BATCH, window - 1, WIDTH)
        weights, memory = (random.normal(size=shape) for shape in shapes)
    else:
        weights, memory = np.array([0.0, 0.9, 1.0]), random.normal(size=(BATCH, WIDTH))
    return x, weights, memory, starts


OPS = pytest.mark.parametrize(
    ("op", "by_hand"),
    [(causal_convolution, convolution_by_hand), (leaky_average, average_by_hand)],
    ids=["convolution", "leaky"],
)


@pytest.mark.usefixtures("x64")
@OPS
@pytest.mark.parametrize("time", [1, 2, TIME])
def test_the_op_is_its_equation(op, by_hand, time):
    call = random_call(op, time)
    for found, expected in zip(op(*map(jnp.asarray, call)), by_hand(*call), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    x, weights, memory, starts = call
    fresh = op(jnp.asarray(x), jnp.asarray(weights))
    expected = by_hand(x, weights, np.zeros_like(memory), np.zeros_like(starts))
    for found, wanted in zip(fresh, expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("x64")
@OPS
def test_gradients_of_all_inputs_are_finite_differences(op, by_hand):  # noqa: ARG001
    *call, starts = map(jnp.asarray, random_call(op, time=5))

    def loss(*call):
        return sum(jnp.sum(jnp.sin(out)) for out in op(*call, starts))

    check_grads(jax.jit(loss), call, order=1, modes=["rev"])


@OPS
def test_any_split_of_the_stream_changes_nothing(op, by_hand):  # noqa: ARG001
    x, weights, memory, starts = map(jnp.asarray, random_call(op))
    whole, end = op(x, weights, memory, starts)
    for cuts in ([4], [1, 9], list(range(1, TIME))):
        carried, parts = memory, []
        for part, begins in zip(jnp.split(x, cuts, 1), jnp.split(starts, cuts, 1), strict=True):
            y, carried = op(part, weights, carried, begins)
            parts.append(y)
        np.testing.assert_allclose(jnp.concatenate(parts, 1), whole, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(carried, end, rtol=1e-5, atol=1e-6)


@OPS
def test_nothing_crosses_time_backwards_a_start_or_a_row(op, by_hand):  # noqa: ARG001
    x, weights, memory, _ = map(jnp.asarray, random_call(op))
    start = 6
    starts = jnp.zeros((BATCH, TIME), bool).at[0, start].set(True)

    def read(x, memory, row, t):
        return op(x, weights, memory, starts)[0][row, t].sum()

    to_x, to_memory = jax.grad(read, (0, 1))(x, memory, 0, 4)
    assert (to_x[0, 5:] == 0).all()
    assert (to_x[1] == 0).all()
    assert (to_memory[1] == 0).all()
    assert (to_x[0, 4] != 0).any()
    to_x, to_memory = jax.grad(read, (0, 1))(x, memory, 0, start + 1)
    assert (to_x[0, :start] == 0).all()
    assert (to_memory == 0).all()
    assert (to_x[0, start] != 0).any()
    kept = jax.grad(lambda x: op(x, weights, memory, starts)[1][0].sum())(x)
    assert (kept[0, :start] == 0).all()
    told, retold = (op(y, weights, memory, starts) for y in (x, x.at[0, :start].add(1.0)))
    assert (told[0][0, start:] == retold[0][0, start:]).all()
    assert (told[1] == retold[1]).all()


@OPS
def test_bfloat16_tokens_are_summed_in_float32(op, by_hand):
    x, weights, memory, starts = random_call(op)
    x = jnp.asarray(x, jnp.bfloat16)
    y, after = op(x, jnp.asarray(weights), starts=jnp.asarray(starts))
    exact, _ = by_hand(np.asarray(x, np.float64), weights, np.zeros_like(memory), starts)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, jnp.asarray(exact, jnp.float32).astype(jnp.bfloat16))
    inputs = op is causal_convolution
    assert after.dtype == (jnp.bfloat16 if inputs else jnp.float32)


def test_a_window_of_one_is_a_product():
    x, kernel, *_ = map(jnp.asarray, random_call(causal_convolution, window=1))
    y, memory = causal_convolution(x, kernel)
    np.testing.assert_array_equal(y, x * kernel[0])
    assert memory.shape == (BATCH, 0, WIDTH)


def test_a_layer_with_a_window_of_one_carries_nothing():
    layer = Convolution([1.0, 0.5], WIDTH, 1, key=jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (BATCH, TIME, 3, WIDTH))
    whole, memory = layer(x)
    assert memory.shape == (BATCH, 0, 2 * WIDTH)
    chex.assert_trees_all_close([part[:, 1:] for part in whole], layer(x[:, 1:], memory)[0])


PARTS = pytest.mark.parametrize(
    ("time", "features", "parts", "window", "documents"),
    [(512, 128, 2, 4, True), (24, 128, 1, 2, True), (8, 256, 3, 8, False), (16, 128, 2, 1, False)],
)


def call_of_parts(time, features, parts, window, documents, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(time), 3)
    x = jax.random.normal(keys[0], (BATCH, time, parts + 1, features), dtype)
    kernel = jax.random.normal(keys[1], (window, parts, features), dtype)
    starts = jax.random.bernoulli(keys[2], 0.1, (BATCH, time)) if documents else None
    return x, kernel, starts


@PARTS
def test_the_kernel_mixes_parts_as_the_equation_does(time, features, parts, window, documents):
    x, kernel, starts = call_of_parts(time, features, parts, window, documents)
    scales = (0.125, 1.5, 1.0)[:parts]

    def run(form):
        def loss(x, kernel):
            y, memory = mixed_parts(x, kernel, None, starts, scales=scales, form=form)
            return sum(jnp.sum(jnp.sin(a)) for a in (*y, memory)), (y, memory)

        grads, values = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(x, kernel)
        return *values, *grads

    expected = run("shifted")
    assert len(expected[0]) == parts + 1
    by_hand = [
        scale * jax.nn.silu(causal_convolution(x[:, :, p], kernel[:, p], None, starts)[0])
        for p, scale in enumerate(scales)
    ]
    chex.assert_trees_all_close(expected[0], [*by_hand, x[:, :, parts]], rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(run(KERNEL), expected, rtol=2e-5, atol=2e-5)


def test_the_kernel_rounds_once():
    x, kernel, starts = call_of_parts(64, 128, 2, 4, documents=True, dtype=jnp.bfloat16)
    exact = call_of_parts(64, 128, 2, 4, documents=True)[2]
    assert (exact == starts).all()
    found, _ = mixed_parts(x, kernel, None, starts, form=KERNEL)
    wide = mixed_parts(x.astype(jnp.float32), kernel.astype(jnp.float32), None, starts)[0]
    for a, b in zip(found, wide, strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(
    ("time", "features", "window", "memory", "said"),
    [
        (12, 128, 4, False, "multiples of 8 tokens"),
        (16, 96, 4, False, "of 128 features"),
        (16, 128, 9, False, "at most 8 weights"),
        (16, 128, 4, True, "without earlier tokens"),
    ],
)
def test_the_kernel_says_what_it_does_not_take(time, features, window, memory, said):
    x, kernel, _ = call_of_parts(time, features, 1, window, documents=False)
    memory = jnp.zeros((BATCH, window - 1, 1, features)) if memory else None
    with pytest.raises(ValueError, match=said):
        mixed_parts(x, kernel, memory, form=KERNEL)
